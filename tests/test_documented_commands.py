"""The command and code blocks of README.md and docs/: each is run, or a comment above it says what it takes.

`<!-- needs: gpu -->` right above a block, which a reader of the page does not see, says that it is not run; NEEDS has
the words. In CI every block is classified, and every program, option, key and file of the project in it has to exist;
commands that train or plan are composed and planned as they stand. With `-m long` all pages are walked in the order of
the site, in one folder, and each block runs on what those before it left: with SMALLER's settings in place of their
own where a CPU would take hours, and with the files and models that a reader brings (`bring`).
"""

from __future__ import annotations

import importlib
import json
import os
import re
import shlex
import shutil
import sys
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest

from conf.build import ConfigError
from conf.schema import RunConfig
from launch.config import load_asked
from launch.plan import main as plan
from launch.plan import split_machine
from train.plan.plan import make_plan

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tests" / "launch"))
NEEDS = {
    "gpu": "a GPU, or hours of a CPU",
    "gpus": "several GPUs",
    "hosts": "several hosts, or SLURM",
    "hub": "a network and the Hugging Face hub",
    "runs": "trained runs that no command of the pages makes in minutes",
    "account": "a login at wandb",
    "names": "Python objects that the text around it speaks of, or another test runs it (tests/test_extending.py)",
    "tests": "it runs the tests",
}
BLOCK = re.compile(
    r"^(?:<!-- needs: (?P<needs>[^\n]*?) -->\n+)?```(?P<language>bash|python)\n(?P<text>.*?)^```", re.M | re.S
)
PLANNED = {"launch/train.py", "launch/plan.py", "launch/run.py", "launch/slurm.sbatch"}
# What a reader has to have before: a model from the hub, or a tokenizer that came with it.
BROUGHT = re.compile(r"models/|init\.source=.*does not exist")

_LENGTHS = ["schedule.seq_len=512", "schedule.batch_tokens=1K", "schedule.tokens=3K"]
_BLOCKS = ["schedule.block_size=32", "schedule.top_k=3"]
_64K, _128K = (f"schedule.stages.at_{length}" for length in ("64k", "128k"))
SMALLER = {
    "launch/train.py": [
        "data.cache_dir=cache", "logging.wandb=disabled", "run.device=cpu", "eval.every_tokens=0", "eval.documents=1"
    ],
    "launch/evaluate.py": ["device=cpu", "documents=2"],
    "launch/generate.py": ["device=cpu", "max_new_tokens=8"],
    "launch/tune_attention.py": ["device=cpu", "seq_len=512"],
    "workers=16": ["workers=1"],
    "+exp=quickstart": ["schedule.tokens=8K", "schedule.batch_tokens=2K"],
    "+exp=moba_32k": ["model=tiny", *_LENGTHS, *_BLOCKS],
    "+exp=full_32k": ["model=tiny", *_LENGTHS, *_BLOCKS],
    "+exp=extend_64k": ["model=tiny", "schedule.seq_len=1K", "schedule.batch_tokens=2K", f"{_64K}.tokens=4K",
                        f"{_64K}.attention.full_last=1"],
    "+exp=extend_128k": ["model=tiny", "schedule.seq_len=2K", "schedule.batch_tokens=2K", f"{_128K}.tokens=4K",
                         f"{_128K}.attention.block_size=64", f"{_128K}.attention.full_last=1"],
    "+exp=sft_quickstart": ["schedule.tokens=16K"],
    "+exp=sft_hybrid": ["model=tiny", "schedule.tokens=16K", "schedule.batch_tokens=4K", "schedule.block_size=64",
                        "schedule.stages.short.seq_len=1K", "schedule.stages.long.seq_len=2K"],
    "+exp=sft_hybrid init.source": [
        "data.sources.main.path=embedded-chat:2K", "data.sources.short.path=embedded-chat:1K",
        "data.validation.path=embedded-chat:2K"],
    "run.name=chats": ["data.validation.path=embedded-chat:2K"],
    "+exp=continual_smollm2": ["model=from_source", *_LENGTHS, *_BLOCKS],
    **{
        f"run.name=small/{stage}": [f"schedule.stages.{stage}.tokens=4K"]
        for stage in ("cpt_256k", "cpt_512k", "cpt_1m", "moba_100b", "sft_32k", "sft_256k", "sft_1m")
    },
    "attention=2Kx3": ["attention=32x3"],
    "evals=[needle] beside": ["lengths=512", "depths=2", "samples=2"],
    "run.dir=runs/continual_cpu": ["optim.lr.warmup_tokens=5%"],
}  # fmt: skip
"""What a command that holds the text on the left is run with, in place of its own values of these keys."""
RENAMED = ("position_loss_000000000303104_", "position_loss_000000000010240_")
"""A result is named after the tokens of the run, which SMALLER changes."""


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: str
    line: int
    language: str
    needs: tuple[str, ...]
    text: str

    def commands(self) -> list[list[str]]:
        """The words of each command of a bash block."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [words for line in lines if (words := shlex.split(line, comments=True))]

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(text: str, page: str) -> list[Block]:
    """The bash and python blocks of a page, in order."""
    return [
        Block(
            page,
            text.count("\n", 0, match.start("language")) + 1,
            match["language"],
            tuple((match["needs"] or "").split()),
            match["text"],
        )
        for match in BLOCK.finditer(text)
    ]


def pages() -> list[str]:
    """README.md and the pages of docs/ itself, in the order of the site's navigation."""
    listed = re.findall(r": ([\w-]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.M)
    assert sorted(listed) == sorted(path.name for path in (ROOT / "docs").glob("*.md"))
    return ["README.md", *(f"docs/{name}" for name in listed)]


BLOCKS = [block for page in pages() for block in blocks((ROOT / page).read_text(encoding="utf-8"), page)]


# -------------------- as it stands


def problems(block: Block) -> Iterator[str]:
    """What a reader would stumble on: a mark, program, option, extra or key that there is not, a missing file."""
    yield from (f"needs {word!r}" for word in block.needs if word not in NEEDS)
    if block.language == "python":
        try:
            compile(block.text, str(block), "exec")
        except SyntaxError as error:
            yield str(error)
        return
    for words in block.commands():
        yield from (f"{shlex.join(words)[:100]}: {problem}" for problem in _problems(words))


def _problems(words: list[str]) -> Iterator[str]:
    program, *rest = words
    if program == "pip" and rest[0] == "install":
        extras = set(re.findall(r"\w[\w-]*", "".join(re.findall(r"\[(.*?)\]", " ".join(rest)))))
        yield from (f"there is no extra {extra}" for extra in extras - _extras().keys())
    elif program == "python" and rest[:2] != ["-m", "pytest"] and rest[0] != "-c":
        yield from _script_problems(rest)
    elif program in ("torchrun", "sbatch"):
        at = next((i for i, word in enumerate(rest) if not word.startswith("-")), 0)
        yield from _torchrun_problems(rest[:at]) if program == "torchrun" else ()
        yield from _script_problems(rest[at:])
    elif program not in ("python", "hf"):
        yield f"{program} is no program that a block may start"


def _extras() -> dict[str, list[str]]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]


def _torchrun_problems(options: Sequence[str]) -> Iterator[str]:
    from torch.distributed.run import get_args_parser

    known = {option.replace("-", "_") for action in get_args_parser()._actions for option in action.option_strings}
    for option in options:
        if option.partition("=")[0].replace("-", "_") not in known:
            yield f"torchrun has no {option}"


def _script_problems(words: Sequence[str]) -> Iterator[str]:
    script, arguments = words[0], words[1:]
    if not (ROOT / script).is_file():
        yield f"there is no {script}"
        return
    known = _keys(script)
    for word in arguments:
        key, equals, _ = word.lstrip("+~").partition("=")
        in_checkout = word.partition("/")[0] in {path.name for path in ROOT.iterdir() if path.is_dir()}
        if not equals and in_checkout and not (ROOT / word).exists():
            yield f"there is no {word}"
        if known is not None and equals and key not in known and not (_is_setting(key) and script[0] == "b"):
            yield f"{script} knows no {key}"


def _keys(script: str) -> set[str] | None:
    """The keys of a command's `key=value`; None of those that train or plan, which are composed."""
    if script in PLANNED:
        return None
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    known = module.keys() if hasattr(module, "keys") else getattr(module, "KEYS", getattr(module, "ALLOWED", None))
    if known is None:  # one that reads sys.argv itself
        return set(re.findall(r"(?:pop\(|get\(|given\[)\"(\w+)\"", Path(module.__file__).read_text(encoding="utf-8")))
    return set(known)


def _is_setting(key: str) -> bool:
    """Whether a benchmark hands it on to a run."""
    groups = {path.name for path in (ROOT / "conf").iterdir() if path.is_dir()}
    section, dot, _ = key.partition(".")
    return key in groups or bool(dot and section in {*RunConfig.__dataclass_fields__, "stage"})


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_a_block_says_what_exists(block):
    """Catches a mark that means nothing, an option, key, extra or script that was renamed, and a file that is gone."""
    assert list(problems(block)) == []


WRONG = {
    "<!-- needs: luck -->\n```bash\npython launch/report.py runs/a\n```": "needs 'luck'",
    "```bash\npip install -e '.[devel]'\n```": "there is no extra devel",
    "```bash\npython launch/generat.py run=x\n```": "there is no launch/generat.py",
    "```bash\npython launch/generate.py run=x prompt_text=y\n```": "launch/generate.py knows no prompt_text",
    "```bash\npython benchmarks/study.py recipes to=x seed=1 optim.lr.peak=1\n```": "benchmarks/study.py knows no seed",
    "```bash\npython launch/compare.py docs/results/nope.json a.json\n```": "there is no docs/results/nope.json",
    "```bash\ntorchrun --nproc=8 launch/train.py +exp=quickstart\n```": "torchrun has no --nproc=8",
    "```bash\nmoba-trian +exp=quickstart\n```": "moba-trian is no program",
    "```python\nfor\n```": "invalid syntax",
}


@pytest.mark.parametrize("text", WRONG)
def test_a_wrong_block_is_found(text):
    """Catches checks that let everything pass, on the smallest page with one mistake in it."""
    (block,) = blocks(f"A page.\n\n{text}\n", "page.md")
    (problem,) = problems(block)
    assert WRONG[text] in problem


def test_most_blocks_are_run_and_none_is_missed():
    """Catches a walk that finds none, marks that excuse nearly everything, and fences that BLOCK does not see."""
    fences = sum(
        len(re.findall(r"^\s*```(?:bash|python|sh|console)", (ROOT / page).read_text(), re.M)) for page in pages()
    )
    run = [block for block in BLOCKS if not block.needs]
    assert len(BLOCKS) == fences and len(run) >= 35
    assert len(BLOCKS) - len(run) < len(run), [str(block) for block in BLOCKS if block.needs]


def planned() -> list[list[str]]:
    """The commands that start or plan a run."""
    found = [words for block in BLOCKS if block.language == "bash" for words in block.commands()]
    return list({tuple(words): words for words in found if set(words) & PLANNED - {"launch/slurm.sbatch"}}.values())


@pytest.mark.parametrize("words", planned(), ids=lambda words: re.sub(r".*launch/", "", " ".join(words))[:60])
def test_a_documented_command_is_accepted(words):
    """Catches a command in the documentation that is refused, which a reader meets first."""
    script = next(i for i, word in enumerate(words) if word in PLANNED)
    if words[script + 1] == "longest":
        plan(words[script + 1 :])
        return
    processes = next((int(word.partition("=")[2]) for word in words if word.startswith("--nproc_per_node=")), 1)
    overrides, hardware = split_machine([word for word in words[script + 1 :] if word not in ("--gpus", "8")])
    if processes > 1:
        hardware = replace(hardware, num_gpus=processes, world_size=processes, local_world_size=processes)
    try:
        config, asked = load_asked(overrides, hardware)
    except ConfigError as error:
        assert all(BROUGHT.search(problem) for problem in error.problems), error.problems
        return
    assert make_plan(config, 4096, hardware, asked_tokens=asked).text()


# -------------------- run


def smaller(words: Sequence[str]) -> list[str]:
    """A command with SMALLER's settings."""
    line = " ".join(words)
    settings = [setting for text, those in SMALLER.items() if text in line for setting in those]
    keys = {setting.partition("=")[0] for setting in settings}
    kept = [word.replace(*RENAMED) for word in words if word.partition("=")[0] not in keys]
    return kept + settings if "launch/plan.py" not in words else list(words)


def bring(folder: Path) -> None:
    """What a reader has beside the checkout: text, conversations, a task, and a small model in place of the hub's."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from data.prepare import prepare
    from data.tokenizer import EMBEDDED, load_tokenizer

    text = " ".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md")))
    parts = [text[start : start + 20_000] for start in range(0, 160_000, 20_000)]
    for place in ("my_books", "books/train", "books/held_out", "books", "code"):
        (folder / place).mkdir(parents=True, exist_ok=True)
        for number, part in enumerate(parts[:4]):
            (folder / place / f"{number}.txt").write_text(f"{place} {part}")
    for name in ("book.txt", "persuasion.txt"):
        (folder / name).write_text(text[:2000])
    (folder / "corpus" / "a").mkdir(parents=True)
    table = pa.table({"id": [str(i) for i in range(len(parts))], "text": parts})
    for path in ("corpus/a/0.parquet", "held_out.parquet"):
        pq.write_table(table, folder / path)
    talk = [{"role": "user", "content": text[:300]}, {"role": "assistant", "content": text[300:600]}]
    (folder / "chats.jsonl").write_text((json.dumps({"messages": talk}) + "\n") * 20)
    (folder / "my_tasks").mkdir()
    (task,) = re.findall(r"```yaml\n(task: .*?)```", (ROOT / "docs" / "evals.md").read_text(encoding="utf-8"), re.S)
    (folder / "my_tasks" / "my_choice.yaml").write_text(task)
    row = {"question": "Is it?", "choices": ["yes", "no"], "answer": 0}
    (folder / "my_tasks" / "choice.jsonl").write_text((json.dumps(row) + "\n") * 3)
    shutil.copytree(ROOT / "docs" / "results", folder / "docs" / "results")
    documents = [(str(i), part) for i, part in enumerate(parts)]
    for name in ("train", "validation"):
        prepare(documents, load_tokenizer("bpe-4k"), folder / "shards" / name, origin={"name": name}, title=name)

    torch.manual_seed(0)
    vocab = load_tokenizer("bpe-4k").vocab_size
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 2}
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=vocab, num_key_value_heads=2, max_position_embeddings=2048, **shape)
    )
    layers = "".join("- [moba, 32, 4, 1]\n" for _ in range(shape["num_hidden_layers"]))
    (folder / "plan.yaml").write_text(f"plan:\n{layers}")
    for name in ("SmolLM2-135M", "small"):
        model.save_pretrained(folder / "models" / name)
        shutil.copyfile(EMBEDDED / "bpe-4k.json", folder / "models" / name / "tokenizer.json")
        names = {"eos_token": "<|endoftext|>", "tokenizer_class": "PreTrainedTokenizerFast"}
        (folder / "models" / name / "tokenizer_config.json").write_text(json.dumps(names))


def script_of(words: Sequence[str]) -> tuple[Path, list[str]] | None:
    """(script, arguments) of a command that is run; None for what needs an installation, and is tested by CI's own."""
    if words[0] in ("pip", "hf", "sbatch"):
        return None
    at = next(i for i, word in enumerate(words) if word.endswith(".py"))
    return ROOT / words[at], list(words[at + 1 :])


def missing_extra(block: Block) -> bool:
    """Whether it installs an extra that this environment has not."""
    modules = {"ruler": "long_context_eval", "lm-eval": "lm_eval"}
    return any(f"[{extra}]" in block.text and find_spec(module) is None for extra, module in modules.items())


@pytest.fixture(scope="module")
def house(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("documented")
    bring(folder)
    return folder


@pytest.fixture(scope="module")
def runner(house):
    """Runs a script in the house, forked from a process that has imported torch: how it ended."""
    import launch_runs

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch_runs, "SECONDS", 1200.0)
        patch.setenv("PYTHONPATH", os.pathsep.join([launch_runs.FORK_PATH, os.environ.get("PYTHONPATH", "")]))
        patch.setenv("HF_HUB_OFFLINE", "1")
        launcher = launch_runs.Launcher(house / ".streams")

        def run(script: Path, arguments: Sequence[str]):
            return launcher.run(arguments, script=script, prepare=partial(os.chdir, house))

        yield run


def run_block(block: Block, house: Path, runner) -> list[str]:
    """What of a block does not end with 0."""
    if block.language == "python":
        path = house / f"{block.page.replace('/', '_')}_{block.line}.py"
        path.write_text(block.text)
        started = [(path, [])]
    else:
        started = [found for words in block.commands() if (found := script_of(smaller(words)))]
    failed = []
    for script, arguments in started:
        ended = runner(script, arguments)
        print(f"{block}: {script.name} {' '.join(arguments)[:150]}: {ended.code}", flush=True)
        if ended.code != 0:
            failed.append(f"{script.name} {shlex.join(arguments)}: {ended}")
    return failed


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("page", pages())
def test_a_page_runs_from_its_top_to_its_end(page, house, runner):
    """Catches a command that fails where it stands, or on what the one before it left. Pages follow on each other: run
    this test for all of them."""
    for block in (block for block in BLOCKS if block.page == page and not block.needs and not missing_extra(block)):
        assert run_block(block, house, runner) == [], str(block)


@pytest.mark.long
def test_a_block_that_fails_is_found(house, runner):
    """Catches a runner that takes any end for a good one."""
    (block,) = blocks("```bash\npython launch/report.py runs/nowhere\n```\n", "page.md")
    (failure,) = run_block(block, house, runner)
    assert "exit 2" in failure
    (block,) = blocks("```python\nassert False\n```\n", "page.md")
    assert len(run_block(block, house, runner)) == 1
