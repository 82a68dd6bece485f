"""What a configuration takes from init.source: with model=from_source its shape and tokenizer, otherwise nothing, but
then they are held against a Hugging Face model's own before anything is allocated.

model=from_source works with a Hugging Face directory or hub id, a run and a checkpoint. Training on another model's
weights with a tokenizer they do not know would run, and be worthless; so that is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from conf.build import ConfigError, Problems, build
from conf.files import user_path
from conf.schema import ModelConfig
from conf.validate import from_yaml
from conf.words import cut

FROM_SOURCE = "from_source"
RUNS = "runs"  # where run.dir lies by default
EXPERIMENTS = Path(__file__).resolve().parents[1] / "conf" / "exp"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def missing_source(source: str | None) -> str | None:
    """What is wrong with an init.source that names a path where nothing is, or no weights are; None for one that is
    there, a hub id, or none."""
    from train.checkpoint import store
    from train.hf import pretrained

    if source is None:
        return None
    if user_path(source).exists():
        if pretrained.is_model(source):
            return None
        try:
            store.find(user_path(source))
        except store.CheckpointError as error:
            nor = "" if (user_path(source) / "checkpoints").is_dir() else "; nor is it a Hugging Face model"
            return f"init.source={cut(source)}: {error}{nor}"
        return None
    first, *rest = Path(source).parts
    if pretrained.HUB_ID.fullmatch(source) and first != RUNS:
        return None
    is_made = first == RUNS and rest and (EXPERIMENTS / f"{'/'.join(rest)}.yaml").is_file()
    made_by = (
        f"run +exp={'/'.join(rest)} first, or name another source"
        if is_made
        else "name a run, a checkpoint or a model directory"
    )
    return f"init.source={cut(source)} does not exist: {made_by}"


def with_source(plain: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """The composed configuration `plain`, with what it takes from init.source filled in.

    A model or tokenizer set on the command line (`overrides`) is kept. ConfigError if the source has another, or
    cannot be used; a source that is not there is left to the start of the run, unless it is needed here.
    """
    if not all(isinstance(plain.get(key) or {}, dict) for key in ("init", "model", "data")):
        return plain  # which is said where sections are typed
    source = (plain.get("init") or {}).get("source")
    if source is not None and not isinstance(source, str):
        return plain
    takes = (plain.get("model") or {}).get("name") == FROM_SOURCE
    if takes and source is None:
        raise ConfigError(["model=from_source needs init.source=<Hugging Face model, run or checkpoint>"])
    if source is None or not (takes or (user_path(source) / "config.json").is_file()):
        return plain
    from train.hf import pretrained

    missing = missing_source(source)
    if missing is not None:
        raise ConfigError([missing])
    if not pretrained.is_model(source):
        return _with_run(plain, source, overrides)
    directory = pretrained.locate(source, weights=False)
    shape = pretrained.read_shape(directory)
    given = plain["model"] if takes else _complete(plain["model"])
    problems = _differences(given, shape)
    problems += [
        f"init.{key}=true: a Hugging Face model has weights only; this works with runs of this project"
        for key in ("optimizer", "data")
        if plain["init"].get(key)
    ]
    tokenizer = str(source) if user_path(source).is_dir() else str(directory)
    has_tokenizer = any((directory / file).is_file() for file in TOKENIZER_FILES)
    filled = _filled(plain, shape, tokenizer if has_tokenizer and takes else None, overrides)
    is_set = any(text.lstrip("+").startswith("data.tokenizer=") for text in overrides)
    if takes and not has_tokenizer and not is_set and filled.get("data", {}).get("tokenizer", "bytes") == "bytes":
        problems.append(
            f"data.tokenizer: {directory} has no tokenizer beside its weights. Set data.tokenizer=<directory or "
            "tokenizer.json> of the one they were trained with (data.tokenizer=bytes if that was bytes)"
        )
    if has_tokenizer:
        problems += _tokenizer_problems(filled.get("data", {}).get("tokenizer", "bytes"), tokenizer)
    if problems:
        raise ConfigError(problems)
    return filled


def _with_run(plain: dict[str, Any], source: str, overrides: Sequence[str]) -> dict[str, Any]:
    """The shape and the tokenizer of a run or checkpoint of this project."""
    from train.checkpoint import store
    from train.hf import source_files

    try:
        found = store.find(user_path(source))
        config_yaml = store.read(found).config_yaml
    except store.CheckpointError as error:
        raise ConfigError([f"init.source={source}: {error}"]) from error
    saved = from_yaml(config_yaml, found / store.CONFIG)
    tokenizer = source_files.tokenizer_name(saved, found)
    problems = _differences(plain["model"], saved.model)
    if problems:
        raise ConfigError(problems)
    return _filled(plain, saved.model, tokenizer, overrides)


def _complete(given: dict[str, Any]) -> dict[str, Any]:
    """A model section with the defaults of what it leaves out."""
    return asdict(ModelConfig()) | given


def _differences(given: dict[str, Any], shape: ModelConfig) -> list[str]:
    from train.hf import pretrained

    problems = Problems()
    built = build(ModelConfig, given, problems)
    problems.raise_if_any()
    try:
        lines = pretrained.differences({key: getattr(built, key) for key in given}, shape)
    except ValueError as error:
        lines = [str(error)]
    hint = "the model section does not match init.source; model=from_source takes it from there"
    return [*lines, hint] if lines else []


def _filled(
    plain: dict[str, Any], shape: ModelConfig, tokenizer: str | None, overrides: Sequence[str]
) -> dict[str, Any]:
    """`plain` with the shape, and with the tokenizer unless there is none or the command line sets one."""
    from train.hf import pretrained

    taken = {name: getattr(shape, name) for name in (*pretrained.SHAPE, "pretrained_length")}
    name = shape.name if plain["model"].get("name") == FROM_SOURCE else plain["model"].get("name", shape.name)
    filled = plain | {"model": plain["model"] | taken | {"name": name}}
    if tokenizer is not None and not any(text.lstrip("+").startswith("data.tokenizer=") for text in overrides):
        filled["data"] = (plain.get("data") or {}) | {"tokenizer": tokenizer}
    return filled


def _tokenizer_problems(given: str, own: str) -> list[str]:
    """What is wrong if `given` makes other ids of a text than the source's tokenizer does."""
    if given == own:
        return []
    from data.errors import DataError
    from data.tokenizer import load_tokenizer

    try:
        is_same = load_tokenizer(given).fingerprint == load_tokenizer(own).fingerprint
    except DataError as error:
        return [str(error)]
    return [] if is_same else [f"data.tokenizer={given}: init.source has its own tokenizer; use data.tokenizer={own}"]
