"""Checkpoints: written atomically, verified before use, independent of ZeRO stage and number of ranks.

    run_dir/checkpoints/
      latest                                  name of the newest one, for people and scripts
      tokens_000000123456789/
        model-00001-of-00002.safetensors      fp32 weights by their names in the model, a tied one once
        model.safetensors.index.json          name -> file, as Hugging Face does
        optimizer-00001-of-00002.safetensors  "<name>.exp_avg", "<name>.exp_avg_sq"
        optimizer.safetensors.index.json
        rng-rank00000.safetensors             random state, one file per rank
        position_loss.safetensors             the caller's tensors
        state.json                            format version, tokens, steps, parameters, the caller's state
        config.yaml
        manifest.json                         size and SHA-256 of every other file; written last

The format is not DeepSpeed's, whose files are pickles (loading one runs code) for one number of ranks, and whose
conversion to another number is silently wrong at stage 3 in 0.19.8. Here each of n ranks writes every n-th parameter
and reads the ranges it holds, tensor by tensor. All ranks must see the run directory.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import distributed as dist
from torch import nn

from conf.files import Count, FileName, Object, parse_object, read_json, read_text
from conf.words import first_line, listed
from train.checkpoint import checkpoint_dir, rng
from train.checkpoint.checkpoint_dir import (
    FORMAT_VERSION,
    STATE,
    CheckpointError,
    Entry,
    clean_stale,
    find,
    newest,
    verify,
)
from train.checkpoint.host_buffer import HostBuffer
from train.checkpoint.saving import Saving, attempt
from train.engine.collectives import barrier, gather_objects
from train.engine.engine import MASTER, MOMENTS, Engine, Slot

__all__ = [
    "CheckpointError",
    "HostBuffer",
    "Saved",
    "Saving",
    "TensorFiles",
    "clean_stale",
    "compare_parameters",
    "find",
    "host_buffer",
    "load_engine",
    "load_weights",
    "newest",
    "open_tensors",
    "read",
    "read_index",
    "save",
    "start_save",
    "verify",
    "verify_together",
]

SHARD_BYTES = 2**30
MODEL_INDEX, OPTIMIZER_INDEX = "model.safetensors.index.json", "optimizer.safetensors.index.json"
CONFIG, TENSORS = "config.yaml", "position_loss.safetensors"


@dataclass(frozen=True)
class Saved:
    """What a checkpoint holds besides weights, moments and random state."""

    path: Path
    tokens: int
    state: dict[str, Any]
    """The caller's JSON state."""
    tensors: dict[str, torch.Tensor]
    """The caller's tensors, on the CPU."""
    config_yaml: str
    meta: dict[str, Any]
    """state.json: also optimizer_step, world_size, zero_stage, precision, stage_end, parameters (name -> shape)."""


# Saving


def save(run_dir: Path, engine: Engine, **content: Any) -> Path:
    """Returns the directory of a new, complete checkpoint: `start_save`, waited for, with one shard at a time in a
    process's memory."""
    return start_save(run_dir, engine, at_once=True, **content).wait()


def start_save(
    run_dir: Path,
    engine: Engine,
    *,
    tokens: int,
    state: dict[str, Any],
    tensors: dict[str, torch.Tensor],
    config_yaml: str,
    stage_end: bool,
    keep: int,
    at_once: bool = False,
    buffer: HostBuffer | None = None,
) -> Saving:
    """Starts to save a new checkpoint; a collective, between steps. On return each rank's part is being copied to its
    host, and further training does not change it; with `at_once` the shards are already written. `buffer` is the memory
    for that copy (`host_buffer`; no unfinished save may use it), else it is allocated.

    `state` (JSON-able), `tensors` and `config_yaml` are rank 0's. Once it is complete, all but the newest `keep`
    checkpoints and those saved with `stage_end` are removed. Raises CheckpointError on all ranks, here or in the
    Saving, with everything older untouched, if a rank cannot write (a full disk).
    """
    main = dist.get_rank() == 0
    temporary = checkpoint_dir.saving_directory(run_dir, tokens)
    attempt(temporary, lambda: checkpoint_dir.begin(run_dir, tokens) if main else None)

    mode = checkpoint_dir.file_mode()
    held: dict[str, dict[str, torch.Tensor]] = {}  # file -> tensors, copies on the host
    files: list[str] = []

    def write_held() -> None:
        while held:
            file = next(iter(held))
            save_file(held.pop(file), temporary / file, metadata={"format": "pt"})
            files.append(file)

    # First what the host waits for: queued behind the large copies it would wait for those too.
    rounds, index = _layout(engine)
    random, texts = rng.random_state(), {}
    small: dict[str, torch.Tensor] = {}
    if main:
        small = {key: value.detach().to("cpu", copy=True).contiguous() for key, value in tensors.items()}
        meta = _meta(engine, tokens, stage_end) | {"state": state}
        texts = {STATE: json.dumps(meta, indent=1), CONFIG: config_yaml}
        texts |= {name: json.dumps(content, indent=1) for name, content in index.items()}
    if buffer is not None:
        buffer.rewind()
    for shards, keys in rounds:
        held |= _gather_round(engine, shards, keys, buffer)
        if at_once:
            attempt(temporary, write_held)
    held[rng.file_name(dist.get_rank())] = random
    if main:
        held[TENSORS] = small
    copied = buffer.copied() if buffer is not None else lambda: None

    def write() -> dict[str, Entry]:
        copied()
        write_held()
        for name, text in texts.items():
            checkpoint_dir.write_text(temporary / name, text)
        return {file: checkpoint_dir.seal(temporary / file, mode) for file in (*files, *texts)}

    def finish(entries: dict[str, Entry]) -> None:
        checkpoint_dir.commit(temporary, entries)
        checkpoint_dir.prune(run_dir, keep)

    return Saving(temporary, write, finish)


def host_buffer(engine: Engine, device: torch.device, say: Callable[[str], None] = lambda line: None) -> HostBuffer:
    """Memory for the copies of `start_save`, allocated in a thread and reused by every save. `say` as in HostBuffer."""
    slots = engine.slots()[dist.get_rank() :: dist.get_world_size()]  # as `_plan` deals them out
    return HostBuffer((1 + len(MOMENTS)) * sum(slot.numel for slot in slots), device, say)


def _meta(engine: Engine, tokens: int, stage_end: bool) -> dict[str, Any]:
    return {
        "format_version": FORMAT_VERSION,
        "tokens": tokens,
        "stage_end": stage_end,
        "optimizer_step": engine.step_count(),
        "world_size": dist.get_world_size(),
        "zero_stage": engine.zero_stage,
        "precision": engine.precision,
        "parameters": {slot.name: list(slot.shape) for slot in engine.slots()},
    }


@dataclass(frozen=True)
class _State:
    """The fields of state.json that are read."""

    tokens: Count
    state: Object
    optimizer_step: Count
    precision: str
    parameters: dict[str, list[Count]]


@dataclass(frozen=True)
class _Index:
    """The fields of an index file that are read."""

    weight_map: dict[str, FileName]


@dataclass(frozen=True)
class _Shard:
    file: str
    owner: int
    slots: list[Slot]


def _plan(slots: list[Slot], kind: str, bytes_each: int, world_size: int) -> list[list[_Shard]]:
    """Returns rounds of at most one shard per rank.

    Parameter i belongs to rank i % world_size; a shard holds SHARD_BYTES at most, or a single larger parameter.
    """
    owned: list[list[list[Slot]]] = [[] for _ in range(world_size)]
    for index, slot in enumerate(slots):
        shards = owned[index % world_size]
        if not shards or (sum(s.numel for s in shards[-1]) + slot.numel) * bytes_each > SHARD_BYTES:
            shards.append([])
        shards[-1].append(slot)
    num_rounds = max(map(len, owned))
    ordered = [(turn, owner) for turn in range(num_rounds) for owner in range(world_size) if turn < len(owned[owner])]
    rounds: list[list[_Shard]] = [[] for _ in range(num_rounds)]
    for number, (turn, owner) in enumerate(ordered, 1):
        file = f"{kind}-{number:05d}-of-{len(ordered):05d}.safetensors"
        rounds[turn].append(_Shard(file, owner, owned[owner][turn]))
    return rounds


def _layout(engine: Engine) -> tuple[list[tuple[list[_Shard], tuple[str, ...]]], dict[str, Any]]:
    """Returns (rounds of shards, each with the kinds of tensors in it; index file -> its content)."""
    slots = engine.slots()
    kinds: dict[str, tuple[str, tuple[str, ...]]] = {MODEL_INDEX: ("model", (MASTER,))}
    if engine.has_moments():
        kinds[OPTIMIZER_INDEX] = ("optimizer", MOMENTS)
    rounds: list[tuple[list[_Shard], tuple[str, ...]]] = []
    index: dict[str, Any] = {}
    for index_file, (kind, keys) in kinds.items():
        bytes_each = 4 * len(keys)
        weight_map: dict[str, str] = {}
        for shards in _plan(slots, kind, bytes_each, dist.get_world_size()):
            weight_map |= {_tensor_name(slot, key): sh.file for sh in shards for slot in sh.slots for key in keys}
            rounds.append((shards, keys))
        total_size = bytes_each * sum(slot.numel for slot in slots)
        index[index_file] = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    return rounds, index


def _gather_round(
    engine: Engine, shards: list[_Shard], keys: tuple[str, ...], buffer: HostBuffer | None
) -> dict[str, dict[str, torch.Tensor]]:
    """Returns the file of this rank, if any, and its tensors: one shard is gathered for each rank."""
    mine: dict[str, dict[str, torch.Tensor]] = {}
    for shard in shards:
        for slot in shard.slots:
            for key in keys:
                into = buffer.take(slot.numel) if buffer is not None and shard.owner == dist.get_rank() else None
                tensor = engine.gather(slot, key, shard.owner, into)
                if tensor is not None:
                    mine.setdefault(shard.file, {})[_tensor_name(slot, key)] = tensor
    return mine


def _tensor_name(slot: Slot, key: str) -> str:
    return slot.name if key == MASTER else f"{slot.name}.{key}"


# Loading


def verify_together(checkpoint: Path) -> None:
    """`verify` as a collective: each rank reads its share of the files, all raise the same CheckpointError."""
    files = checkpoint_dir.manifest(checkpoint)
    mine = sorted(files)[dist.get_rank() :: dist.get_world_size()]
    found = [checkpoint_dir.damage(checkpoint, file, files[file]) for file in mine]
    checkpoint_dir.raise_damage(checkpoint, [text for part in gather_objects(found) for text in part if text])


def read(checkpoint: Path) -> Saved:
    """Returns everything but weights, moments and random state, the files it comes from verified first.

    Raises CheckpointError.
    """
    verify(checkpoint, (STATE, CONFIG, TENSORS))
    meta = _read_state(checkpoint)
    config_yaml = read_text(checkpoint / CONFIG, error=CheckpointError)
    try:
        tensors = load_file(checkpoint / TENSORS)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{checkpoint / TENSORS} is damaged ({first_line(error)})") from error
    return Saved(checkpoint, meta["tokens"], meta["state"], tensors, config_yaml, meta)


def _read_state(checkpoint: Path) -> dict[str, Any]:
    """Returns the content of state.json, which has at least the fields of _State."""
    text = read_text(checkpoint / STATE, error=CheckpointError)
    return parse_object(text, _State, where=checkpoint / STATE, error=CheckpointError)


def read_index(directory: Path, index_file: str = MODEL_INDEX) -> dict[str, str]:
    """Returns tensor name -> name of a file in `directory`, as an index file says. Raises CheckpointError."""
    return read_json(directory / index_file, _Index, error=CheckpointError).weight_map


def open_tensors(path: Path) -> Any:
    """Returns an open safetensors file. Raises CheckpointError."""
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged ({first_line(error)}): copy it again") from error


class TensorFiles:
    """Ranges of the tensors in a directory's safetensors files, read without loading whole files.

    `weight_map` says which tensor is in which file; files stay open until `stack` closes.
    """

    def __init__(self, directory: Path, weight_map: dict[str, str], stack: ExitStack) -> None:
        self._directory, self._files = directory, weight_map
        self._open: dict[str, Any] = {}
        self._stack = stack

    def elements(self, name: str, shape: tuple[int, ...], start: int, size: int) -> torch.Tensor:
        """Returns elements [start, start + size) of a tensor laid out flat. Raises CheckpointError if there is none of
        this name and shape."""
        file = self._files.get(name)
        if file is None:
            raise CheckpointError(f"{self._directory} has no tensor {name}")
        if file not in self._open:
            self._open[file] = self._stack.enter_context(open_tensors(self._directory / file))
        row = math.prod(shape[1:])
        first, last = start // row, -(-(start + size) // row)
        try:
            whole = self._open[file].get_slice(name)
            found = tuple(whole.get_shape())
            rows = whole[first:last] if found == tuple(shape) else None
        except SafetensorError as error:
            raise CheckpointError(f"{self._directory / file}: {name}: {first_line(error)}") from error
        if rows is None:
            raise CheckpointError(f"{self._directory / file}: {name} is {found} instead of {tuple(shape)}")
        return rows.reshape(-1)[start - first * row :][:size]


def load_engine(engine: Engine, checkpoint: Path, *, optimizer: bool = True) -> None:
    """Loads a checkpoint's fp32 weights, and with `optimizer` AdamW's moments and step count, into an engine; a
    collective.

    Exact for any ZeRO stage and number of ranks. Raises CheckpointError on all ranks if a file is damaged or the
    parameters differ.
    """
    verify_together(checkpoint)
    meta = read(checkpoint).meta
    compare_parameters({slot.name: slot.shape for slot in engine.slots()}, meta["parameters"], checkpoint)
    step = meta["optimizer_step"] if optimizer else 0
    with ExitStack() as stack:
        files = {MASTER: TensorFiles(checkpoint, read_index(checkpoint, MODEL_INDEX), stack)}
        if step:
            files |= dict.fromkeys(MOMENTS, TensorFiles(checkpoint, read_index(checkpoint, OPTIMIZER_INDEX), stack))

        def elements(key: str, slot: Slot) -> torch.Tensor:
            return files[key].elements(_tensor_name(slot, key), slot.shape, slot.start, slot.size)

        engine.restore(elements, step=step)
    barrier()


def compare_parameters(model: dict[str, Any], saved: dict[str, Any], source: Path) -> None:
    """Raises CheckpointError listing how a model's parameters (name -> shape) differ from the saved ones."""
    saved = {name: tuple(shape) for name, shape in saved.items()}
    problems = [f"{name} is not in the checkpoint" for name in model if name not in saved]
    problems += [f"{name} is not in the model" for name in saved if name not in model]
    problems += [
        f"{name} is {saved[name]} in the checkpoint and {tuple(shape)} in the model"
        for name, shape in model.items()
        if name in saved and saved[name] != tuple(shape)
    ]
    if problems:
        raise CheckpointError(f"{source} does not fit model.*: {listed(problems, '; ')}")


@torch.no_grad()
def load_weights(model: nn.Module, source: Path) -> Path:
    """Loads a checkpoint's weights into a model; returns that checkpoint: `source`, or the newest of the run directory
    `source`.

    For init.source and for evaluation: no engine, no process group, each process reads all weights, one tensor at a
    time. A bf16 engine built afterwards starts from rounded weights; load_engine(..., optimizer=False) then restores
    the fp32 ones. Raises CheckpointError.
    """
    checkpoint = find(source)
    verify(checkpoint, [f for f in checkpoint_dir.manifest(checkpoint) if f.startswith("model") or f == STATE])
    parameters = dict(model.named_parameters())
    shapes = {name: tuple(p.shape) for name, p in parameters.items()}
    compare_parameters(shapes, _read_state(checkpoint)["parameters"], checkpoint)
    with ExitStack() as stack:
        tensors = TensorFiles(checkpoint, read_index(checkpoint), stack)
        for name, parameter in parameters.items():
            parameter.copy_(tensors.elements(name, shapes[name], 0, parameter.numel()).reshape(shapes[name]))
    return checkpoint
