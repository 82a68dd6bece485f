"""docs/extending.md: its code, run from outside the project as a reader would."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
KIND = re.search(r"```python\n(.*?)```", PAGE, re.S).group(1)

RUN = """
import sys
run, at = sys.argv[1], "schedule.stages.sparse.attention"
length = ["schedule.seq_len=256", "schedule.batch_tokens=1K", "schedule.block_size=16", "schedule.tokens=12K"]
overrides = ["+exp=quickstart", f"{at}.kind=strided", f"{at}.stride=2", *length, f"run.dir={run}", "run.device=cpu"]
overrides += ["eval.documents=2", "logging=quiet"]
from launch import train
train.main(overrides)
"""

LOOK = """
import sys
import torch
from launch import evaluate, export, generate
from launch.config import load
from moba.documents import Documents
from moba.kv_cache import KVCache
from evals.loading import attention_plan, load_trained
from train.plan.plan import make_plan
run, at = sys.argv[1], "schedule.stages.sparse.attention"
plan = make_plan(load(["+exp=quickstart", f"{at}.kind=strided", f"{at}.stride=2"]), 384).text()
assert "strided 64/2 on torch" in plan, plan

kind = Strided(8, 3)
seen = [[k <= q and (k // 8 == q // 8 or k // 8 % 3 == 0) for k in range(100)] for q in range(100)]
assert kind.attended_pairs(100) == sum(map(sum, seen))

checkpoint = sorted(p for p in (Path(run) / "checkpoints").iterdir() if p.name.startswith("tokens"))[0]
trained = load_trained(checkpoint, "cpu")
model, tokens = trained.model, torch.arange(100) % 50
assert str(model.attention[0]) == "strided 16/2", model.attention
with torch.no_grad():
    whole = model.logits(tokens, torch.arange(100), Documents.from_lengths([100]))
    cache = KVCache(len(model.attention))
    one = Documents.from_lengths([1])
    parts = [model.logits(tokens[i : i + 1], torch.tensor([i]), one, cache) for i in range(100)]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-3, atol=1e-4)
    model.set_attention(attention_plan("full", trained))
    dense = model.logits(tokens, torch.arange(100), Documents.from_lengths([100]))
assert not torch.allclose(dense[40:], whole[40:], atol=1e-3)
evaluate.main([f"run={checkpoint}", "evals=[position_loss]", "documents=2", "device=cpu", "seq_len=256"])
print("all done", flush=True)
export.main([f"run={checkpoint}", f"to={run}/hf"])
"""


def test_a_kind_of_attention_is_what_the_page_says(tmp_path):
    """Catches a place outside the kind's own file that has to know of it: a kind added from outside is planned, trains
    on two ranks, decodes as it reads, is evaluated, densely too, and is refused by export."""
    train, look, run = tmp_path / "train.py", tmp_path / "look.py", tmp_path / "run"
    head = f"import sys\nfrom pathlib import Path\nsys.path.insert(0, {str(ROOT)!r})\nimport train.engine.world\n"
    train.write_text(head + KIND + RUN)
    look.write_text(head + KIND + LOOK)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    options = {"cwd": tmp_path, "capture_output": True, "text": True, "timeout": 280}
    done = subprocess.run([*torchrun, str(train), str(run)], **options)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    done = subprocess.run([sys.executable, str(look), str(run)], **options)
    assert "all done" in done.stdout, done.stdout[-2000:] + done.stderr[-4000:]
    assert done.returncode == 2 and "strided attention" in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert not (run / "hf").exists()
