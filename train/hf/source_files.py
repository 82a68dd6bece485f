"""Copies, in a run directory, of the source model's files besides weights: tokenizer, chat template, generation
settings and config.json.

They are in `source/`, so that the run can be exported and generated from when the original has moved or is gone, and so
that an export keeps what the original's files said.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from conf.files import user_path
from conf.schema import RunConfig
from data.tokenizer import SHIPPED

FOLDER, CONFIG = "source", "config.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
)
MODEL_FILES = (CONFIG, "generation_config.json")


def keep(config: RunConfig, run_dir: Path, source: Path | None) -> None:
    """Copies into the run directory the files of data.tokenizer and of `source` (a Hugging Face directory, a run or a
    checkpoint; None: no source). For one process."""
    given = _path(config.data.tokenizer)
    found = {}
    if given is not None:
        beside = given if given.is_dir() else given.parent
        found = {name: beside / name for name in TOKENIZER_FILES}
        if given.is_file():
            found["tokenizer.json"] = given
    if source is not None:
        model = source if (source / CONFIG).is_file() else run_directory(source) / FOLDER
        found |= {name: model / name for name in MODEL_FILES}
    for name, path in found.items():
        if path.is_file() and not _is_same(path, run_dir / FOLDER / name):
            (run_dir / FOLDER).mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, run_dir / FOLDER / name)


def tokenizer_name(config: RunConfig, checkpoint: Path) -> str:
    """data.tokenizer of the run that a checkpoint belongs to: the kept copy where there is one."""
    name, folder = config.data.tokenizer, run_directory(checkpoint) / FOLDER
    if _path(name) is None or not any((folder / file).is_file() for file in TOKENIZER_FILES):
        return name
    return str(folder / "tokenizer.json" if Path(name).suffix == ".json" else folder)


def model_file(checkpoint: Path, name: str) -> Path | None:
    """The kept file of MODEL_FILES, None if the run has none."""
    path = run_directory(checkpoint) / FOLDER / name
    return path if path.is_file() else None


def run_directory(source: Path) -> Path:
    """The run directory of a run or of one of its checkpoints; any other directory is itself."""
    return source.parents[1] if source.parent.name == "checkpoints" else source


def _path(tokenizer: str) -> Path | None:
    """The path of a tokenizer that is neither `bytes` nor shipped."""
    return None if tokenizer == "bytes" or tokenizer in SHIPPED else user_path(tokenizer)


def _is_same(path: Path, copy: Path) -> bool:
    return copy.is_file() and copy.samefile(path)
