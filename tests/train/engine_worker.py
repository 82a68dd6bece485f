"""Runs engines in one or several processes and reports what they did, for test_step.py and test_checkpoint.py.

first DIRECTORY     each engine: steps 0 to 5 with a checkpoint at step 3; then steps that go wrong; then step 6; then
                    steps 7 and 8 with the optimizer reset
second DIRECTORY    each engine, in a new process: steps 3 to 6, continued from the checkpoints of `first`
pinned DIRECTORY    each engine on the GPU, if there is one: two saves from one buffer while the device is behind
"""

from __future__ import annotations

import functools
import importlib
import json
import random
import resource
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import torch
from engine_runs import (
    COMPILED,
    ENGINES,
    LAST,
    SAVE_AT,
    bad_kinds,
    build_model,
    config_of,
    learning_rate,
    micro_batches,
    other_stage,
)
from safetensors import safe_open

from train.checkpoint import store
from train.checkpoint.rng import load_rng, seed_rank
from train.engine import deepspeed_engine
from train.engine.collectives import all_reduce_sum, any_rank, gather_objects
from train.engine.engine import MASTER, MOMENTS
from train.engine.optim import build_engine
from train.engine.world import World, init_world, leave, shutdown
from train.model import decoder
from train.spikes import Spikes
from train.step import StepResult, train_step


def one_step(engine: Any, step: int, world: World, **options: Any) -> tuple[dict[str, Any], StepResult]:
    batches = micro_batches(step, world.rank, world.world_size)
    result = train_step(engine, batches, lr=learning_rate(step), world=world, **options)
    loss = float(all_reduce_sum(result.loss_sum.clone())) / result.num_tokens
    record = {"loss": loss, "grad_norm": float(result.grad_norm), "num_tokens": result.num_tokens}
    return record, result


def steps(engine: Any, numbers: range, world: World) -> list[dict[str, Any]]:
    return [one_step(engine, step, world)[0] for step in numbers]


def content(tokens: int) -> dict[str, Any]:
    return {
        "tokens": tokens,
        "state": {"step": tokens, "names": ["a", "b"]},
        "tensors": {"sums": torch.arange(3.0), "counts": torch.tensor([2, 1])},
        "config_yaml": "run:\n  name: test\n",
        "stage_end": False,
        "keep": 2,
    }


def save(directory: Path, engine: Any, tokens: int) -> Path:
    return store.save(directory, engine, **content(tokens))


def save_beside(directory: Path, engine: Any, tokens: int, buffer: Any = None) -> Path:
    """Saved in a thread, which writes only after weights and moments have been changed and set back."""
    writes = threading.Event()
    save_file = store.save_file
    store.save_file = lambda *args, **options: (writes.wait(), save_file(*args, **options))
    saving = store.start_save(directory, engine, **content(tokens), buffer=buffer)
    with torch.no_grad():
        held = [engine._share(slot, key) for slot in engine.slots() if slot.size for key in (MASTER, *MOMENTS)]
        kept = [tensor.clone() for tensor in held]
        for tensor in held:
            tensor.fill_(7)
        assert not saving.poll()
        writes.set()
        try:
            return saving.wait()
        finally:
            store.save_file = save_file
            for tensor, before in zip(held, kept):
                tensor.copy_(before)


def draws() -> list[float]:
    return [
        float(torch.rand(())),
        float(np.random.rand()),
        float(np.random.randn()),
        random.random(),
        random.gauss(0, 1),
    ]


def snapshot(engine: Any) -> list[torch.Tensor]:
    """Everything the optimizer holds, on rank 0."""
    keys = (MASTER, *MOMENTS)
    return [engine.gather(slot, key, owner=0) for slot in engine.slots() for key in keys]


def same(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    """True if equal bit by bit, on rank 0."""
    return all(torch.equal(a.view(torch.int32), b.view(torch.int32)) for a, b in zip(left, right) if a is not None)


def bad_step(engine: Any, world: World, kind: str) -> dict[str, Any]:
    """A step gone wrong on the last rank: the loss nan or inf, or only the gradient nan; or one whose loss or gradient
    norm is a spike after what was good before."""
    spikes = None
    if kind.startswith("spike"):
        spikes = Spikes(6.0, 4, world.device)
        for number in (1.0, 1.1):
            pair = (number, 1e6 * number) if kind == "spike of the loss" else (1e6 * number, 1e-3 * number)
            spikes.add(*map(torch.tensor, pair))
    seen: list[torch.Tensor] = []

    def spoil(module: Any, inputs: Any, losses: torch.Tensor) -> torch.Tensor:
        if kind == "gradient":
            losses.register_hook(lambda grad: grad * torch.nan)
            return losses
        if kind.startswith("spike"):
            return losses
        return losses + (torch.nan if kind == "nan" else torch.inf)

    before = snapshot(engine), engine.step_count()
    hook = engine.model.register_forward_hook(spoil) if world.rank == world.world_size - 1 else None
    record, result = one_step(
        engine, LAST + 1, world, on_losses=lambda losses, batch: seen.append(losses), spikes=spikes
    )
    if hook:
        hook.remove()
    after = snapshot(engine), engine.step_count()
    return {
        "skipped": gather_objects(bool(result.skipped)),
        "spike": gather_objects(result.spike),
        "untouched": same(before[0], after[0]) and before[1] == after[1],
        "observed": sum(int(losses.isfinite().sum()) for losses in seen),
        "loss_is_finite": bool(np.isfinite(record["loss"])),
    }


def observed_step(engine: Any, world: World) -> tuple[dict[str, Any], StepResult, list[torch.Tensor]]:
    """The last step, with what its observer saw, and rank 0 asking to stop."""
    seen: list[torch.Tensor] = []
    record, result = one_step(
        engine, LAST, world, stop=world.rank == 0, on_losses=lambda losses, batch: seen.append(losses)
    )
    return record, result, seen


def reset(engine: Any, world: World) -> dict[str, Any]:
    """Two more steps from fresh moments, and what the reset left."""
    before = snapshot(engine)
    engine.reset_moments()
    after = snapshot(engine)
    moments = [t for i, t in enumerate(after) if i % 3 and t is not None]
    return {
        "step_count": engine.step_count(),
        "weights_kept": same(before[::3], after[::3]) and not same(before, after) if world.is_main else True,
        "moments_are_zero": all(not t.any() for t in moments),
        "steps": steps(engine, range(LAST + 1, LAST + 3), world),
    }


def full_disk(engine: Any, directory: Path, world: World) -> dict[str, Any]:
    """Saving where the last rank may write no file longer than 4 KB."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    before = store.newest(directory)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if world.rank == world.world_size - 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    messages = []
    for attempt in (save, save_beside):
        try:
            attempt(directory, engine, 99)
        except store.CheckpointError as error:
            messages.append(str(error))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    return {
        "messages": [text for mine in gather_objects(messages) for text in mine],
        "left": sorted(path.name for path in (directory / "checkpoints").iterdir()),
        "newest_kept": store.newest(directory) == before,
    }


def first(directory: Path, world: World) -> dict[str, Any]:
    report: dict[str, Any] = {}
    for name in ENGINES:
        engine = build_engine(build_model(name == COMPILED), config_of(name), world)
        run_dir = directory / f"{name}-{world.world_size}"
        mine: dict[str, Any] = {"optimizer": type(engine._optimizer).__name__}
        if name == "z2-bf16":
            save(run_dir, engine, 0)
        buffer = store.host_buffer(engine, world.device)
        store.start_save(directory / "earlier" / run_dir.name, engine, **content(0), buffer=buffer).wait()
        mine["steps"] = steps(engine, range(SAVE_AT), world)
        seed_rank(5)
        save(directory / f"at-once-{name}-{world.world_size}", engine, SAVE_AT)
        save_beside(run_dir, engine, SAVE_AT, buffer)
        mine["draws"] = gather_objects(draws())
        mine["steps"] += steps(engine, range(SAVE_AT, LAST), world)
        mine["bad"] = {kind: bad_step(engine, world, kind) for kind in bad_kinds(name)}
        record, result, seen = observed_step(engine, world)
        mine["steps"].append(record)
        mine["stop"] = gather_objects(result.stop)
        mine["observed_sum"] = sum(gather_objects(float(torch.cat(seen).double().sum())))
        if name == "z1":
            mine["full_disk"] = full_disk(engine, run_dir, world)
        mine["reset"] = reset(engine, world)
        if name == COMPILED:
            counters = importlib.import_module("torch._dynamo.utils").counters
            mine["graphs"], mine["breaks"] = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
        report[name] = mine
        engine.destroy()
    flag = torch.tensor(world.rank == world.world_size - 1)
    report["any_rank"] = [bool(any_rank(flag)), bool(any_rank(torch.tensor(False)))]
    return report


def files_hold(path: Path, engine: Any) -> bool:
    """True if the engine holds, bit by bit, what the files of a checkpoint say (read by the library, on rank 0)."""
    tensors: dict[str, torch.Tensor] = {}
    for file in path.glob("*-of-*.safetensors"):
        with safe_open(file, framework="pt") as content:
            tensors |= {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
    keys = (MASTER, *MOMENTS)
    names = [slot.name if key == "master" else f"{slot.name}.{key}" for slot in engine.slots() for key in keys]
    return same(snapshot(engine), [tensors[name] for name in names])


def second(directory: Path, world: World) -> dict[str, Any]:
    report: dict[str, Any] = {}
    for name in ENGINES:
        engine = build_engine(build_model(name == COMPILED), config_of(name), world)
        sources = {"same": f"{name}-{world.world_size}", "other_world": f"{name}-{3 - world.world_size}"}
        if other_stage(name):
            sources["other_stage"] = f"{other_stage(name)}-{world.world_size}"
        mine: dict[str, Any] = {}
        for kind, run in sources.items():
            path = directory / run / "checkpoints" / store.checkpoint_dir.directory_name(SAVE_AT)
            store.load_engine(engine, path)
            load_rng(path, seed=5)
            mine[kind] = {"exact": files_hold(path, engine), "draws": gather_objects(draws())}
            mine[kind]["steps"] = steps(engine, range(SAVE_AT, LAST + 1 if kind == "same" else LAST - 1), world)
        report[name] = mine
        engine.destroy()
    return report


def pinned(directory: Path, world: World) -> dict[str, Any]:
    report: dict[str, Any] = {}
    for name in ENGINES:
        engine = build_engine(build_model(name == COMPILED), config_of(name), world)
        said: list[str] = []
        buffer = store.host_buffer(engine, world.device, said.append)
        exact = []
        for tokens in (1, 2):
            steps(engine, range(tokens), world)
            at_once = save(directory / f"at-once-{name}", engine, tokens)
            if world.device.type == "cuda":
                torch.cuda._sleep(2_000_000_000)  # about a second, in which the host goes on
            beside = save_beside(directory / name, engine, tokens, buffer)
            files = [path.name for path in at_once.iterdir() if path.suffix == ".safetensors"]
            exact.append(all((beside / file).read_bytes() == (at_once / file).read_bytes() for file in files))
        report[name] = {"exact": exact, "pinned": buffer.take(0).is_pinned(), "said": said}
        engine.destroy()
    return report


if __name__ == "__main__":
    role, target = sys.argv[1], Path(sys.argv[2])
    here = init_world("cuda" if role == "pinned" and torch.cuda.is_available() else "cpu")
    # So that the small model fills several files and several rounds of gathering.
    store.SHARD_BYTES, deepspeed_engine.GATHER_ELEMENTS = 3000, 100
    decoder._compiled = functools.cache(lambda function: torch.compile(function, backend="aot_eager"))
    report = {"first": first, "second": second, "pinned": pinned}[role](target, here)
    if here.is_main:
        (target / f"{role}-{here.world_size}.json").write_text(json.dumps(report))
    shutdown()
    leave(0)
