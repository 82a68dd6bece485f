"""The file of a folder with its own code: made of our sources, complete, and computing what they compute."""

from __future__ import annotations

import ast
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import moba.kinds
from moba import remote_code as overlay
from moba.backends.torch_blocks import moba_torch
from moba.documents import Documents
from moba.reference import reference_attention
from train.hf import remote_code

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def text() -> str:
    return remote_code.source("LlamaForCausalLM")


@pytest.fixture(scope="module")
def file(text, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("remote") / remote_code.FILE
    path.write_text(text)
    return path


def test_every_name_in_the_file_is_there_once(file):
    """Catches a definition that was left behind, that two modules have by the same name, and an import of ours."""
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F,E9", str(file)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    tree = ast.parse(file.read_text())
    froms = {(node.module or "").partition(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    tops = {
        alias.name.partition(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names
    }
    outside = (froms | tops) - sys.stdlib_module_names
    assert outside == {"torch", "transformers", "triton"}


def test_functions_are_those_of_the_sources(text):
    """Catches a second copy that was written by hand: but for names, each function is one of the module's that its
    section names."""
    section, checked = None, 0
    for node in ast.parse(text).body:
        above = [line for line in text.splitlines()[: node.lineno] if line.startswith("# -----")]
        section = above[-1].split()[-1] if above else None
        for one in node.body if isinstance(node, ast.If) else [node]:
            if section is None or not isinstance(one, ast.FunctionDef):
                continue
            source = ast.parse((ROOT / section).read_text())
            shapes = [shape(own) for own in source.body if isinstance(own, ast.FunctionDef)]
            assert shape(one) in shapes, f"{section}: {one.name}"
            checked += 1
    assert checked > 60


def shape(function: ast.FunctionDef) -> str:
    """What a function does, without its text, imports of ours and the names of others."""
    body = [node for node in function.body if not (isinstance(node, ast.ImportFrom) and "moba" in (node.module or ""))]
    if isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
        body = body[1:]
    nodes = [node for statement in body for node in ast.walk(statement) if not isinstance(node, ast.ImportFrom)]
    constants = [repr(node.value) for node in nodes if isinstance(node, ast.Constant)]
    return " ".join([*(type(node).__name__ for node in nodes), *constants])


@pytest.mark.parametrize(
    "entry",
    [
        ["moba", 64, 3],
        ["moba", 64, 3, 1],
        ["full", None, None],
        ["moba", 64, 3, 3],
        ["moba", 0, 3],
        ["moba", None, 3],
        ["moba", 64, None],
        ["moba", 64, 3, True],
        ["full", 64, 3],
        ["full", None, None, 0],
        ["sliding", 64, None],
        ["moba", 64],
    ],
    ids=str,
)
def test_entries_of_the_plan_mean_the_same(entry):
    """Catches a plan that the file takes and our own reader does not, or takes for something else."""

    def meaning(read):
        try:
            spec = read(entry)
        except ValueError:
            return "refused"
        return spec.routing

    assert meaning(overlay.from_entry) == meaning(moba.kinds.from_entry)


@pytest.mark.parametrize("kind", [(16, 3, 0), (16, 3, 1), (16, 1, 0), (None, 1, 0), (64, 4, 0)], ids=str)
@pytest.mark.parametrize("earlier", [0, 37])
def test_the_two_ways_to_attend_agree(kind, earlier):
    """Catches another selection, scale or order of keys than moba.attention's, in packs and over a cache."""
    torch.manual_seed(0)
    lengths = [70, 1, 90]
    q = torch.randn(sum(lengths), 4, 16, dtype=torch.float64)
    k, v = (torch.randn(sum(lengths) + 3 * earlier, 2, 16, dtype=torch.float64) for _ in range(2))
    documents = Documents.from_lengths(lengths, [length + earlier for length in lengths])
    spec = overlay.AttentionSpec(*kind)
    found, _ = overlay.attend(q, k, v, spec, documents, softmax_scale=0.3)
    size, top_k, first = (1000, 1, 0) if kind[0] is None else kind
    sizes = {"block_size": size, "top_k": top_k, "first_blocks": first, "softmax_scale": 0.3}
    torch.testing.assert_close(found, reference_attention(q, k, v, **documents.bounds, **sizes))


KERNELS = """
import importlib.util, sys, torch
spec = importlib.util.spec_from_file_location("modeling_moba", sys.argv[1])
module = importlib.util.module_from_spec(spec)
sys.modules["modeling_moba"] = module
spec.loader.exec_module(module)
given = torch.load(sys.argv[2])
documents = module.Documents.from_lengths(given["lengths"])
outs = []
for *sizes, first in given["sizes"]:
    outs.append(module.moba_triton(*given["qkv"], module.Routing(*sizes, "mean", first), documents))
torch.save(outs, sys.argv[3])
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton, for its interpreter")
def test_the_kernels_of_the_file_compute_moba(file, tmp_path):
    """Catches a kernel of which a part has another's name: short and long blocks, first blocks, groups, tails."""
    torch.manual_seed(0)
    lengths, cases = [70, 3], [(16, 3, 1), (33, 2, 0)]
    q, k, v = (torch.randn(sum(lengths), heads, 16) for heads in (2, 1, 1))
    torch.save({"qkv": (q, k, v), "lengths": lengths, "sizes": cases}, tmp_path / "given.pt")
    arguments = [str(file), str(tmp_path / "given.pt"), str(tmp_path / "found.pt")]
    done = subprocess.run(
        [sys.executable, "-c", KERNELS, *arguments],
        capture_output=True,
        text=True,
        timeout=280,
        cwd=tmp_path,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    documents = Documents.from_lengths(lengths)
    for found, (block_size, top_k, first) in zip(torch.load(tmp_path / "found.pt"), cases):
        sizes = {"block_size": block_size, "top_k": top_k, "first_blocks": first}
        expected = reference_attention(q, k, v, **documents.bounds, **sizes)  # pyright: ignore[reportArgumentType]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_the_file_runs_its_kernels(file, tmp_path, monkeypatch):
    """Catches a folder that is as slow as torch where Triton is there, or computes something else with it; and one
    whose gradients stay away."""
    spec = importlib.util.spec_from_file_location("modeling_moba", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "modeling_moba", module)
    spec.loader.exec_module(module)
    torch.manual_seed(0)
    lengths = [5000, 17, 3000]
    q, k, v = (torch.randn(sum(lengths), heads, 64, device="cuda", dtype=torch.bfloat16) for heads in (8, 2, 2))
    kind, documents = module.AttentionSpec(128, 4, 1), module.Documents.from_lengths(lengths, device="cuda")
    calls = []
    kernels = module.moba_triton
    monkeypatch.setattr(module, "moba_triton", lambda *given: calls.append(1) or kernels(*given))
    fast = module.attend(q, k, v, kind, documents)[0]
    assert calls == [1]
    exact = Documents.from_lengths(lengths, device="cuda")
    selection = moba.remote_code.select_blocks(
        q, moba.remote_code.layout_means(k, exact.layout(128)), exact.layout(128), 4, 1
    )
    slow = moba_torch(q, k, v, exact, block_size=128, top_k=4, selection=selection)[0]
    # A near-tie of two blocks may turn where means are summed in another order.
    wrong = ((fast.float() - slow.float()).abs() > 3e-2).any(dim=-1).float().mean()
    assert wrong < 1e-3, wrong
    q.requires_grad_()
    module.attend(q, k, v, kind, documents)[0].float().sum().backward()
    assert calls == [1] and q.grad is not None and torch.isfinite(q.grad).all()
