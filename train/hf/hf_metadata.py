"""Metadata of an exported model beside weights and architecture: end-of-text tokens, context length, and RoPE in both
of transformers' layouts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from conf.files import Object, read_json

GENERATION, TOKENIZER_CONFIG, SPECIAL_TOKENS = (
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
)
NO_LIMIT = 10**9  # transformers writes 10^30 where a tokenizer knows no length


def with_both_ropes(config: dict[str, Any]) -> dict[str, Any]:
    """A config.json with its RoPE as `rope_theta` and `rope_scaling`, all that older transformers read, and as
    `rope_parameters`, from whichever it has."""
    if "rope_parameters" in config:
        scaling = dict(config["rope_parameters"])
        theta = scaling.pop("rope_theta", config.get("rope_theta"))
        is_plain = scaling.get("rope_type", "default") == "default"
        return config | {"rope_theta": theta, "rope_scaling": None if is_plain else scaling}
    scaling = config.get("rope_scaling") or {"rope_type": "default"}
    return config | {"rope_parameters": scaling | {"rope_theta": config["rope_theta"]}}


def generation_config(
    original: Path | None, *, eos: Sequence[int] | None, old_length: int | None, length: int
) -> dict | None:
    """The content of generation_config.json: the original's, ending at the tokens `eos` (None: where it ended).

    One that bounded texts by the model's old context bounds them by the new. None where nothing of it changes.
    """
    given = {} if original is None else read_json(original, Object, remedy="Remove it from the run's source/ folder")
    changed = {} if eos is None else {"eos_token_id": ids(eos)}
    if old_length is not None and given.get("max_length") == old_length != length:
        changed["max_length"] = length
    return given | changed if changed else None


def ids(eos: Sequence[int]) -> int | list[int]:
    """One token as a number, several as a list, as Hugging Face writes them."""
    return eos[0] if len(eos) == 1 else list(eos)


def finish_tokenizer(folder: Path, *, eos: str | None, length: int) -> None:
    """Sets the end-of-text token (None: as it is) and the context length in the tokenizer's files in `folder`."""
    for name in (TOKENIZER_CONFIG, SPECIAL_TOKENS):
        path = folder / name
        if not path.is_file():
            continue
        content = read_json(path, Object, remedy="It belongs to data.tokenizer")
        changed: dict[str, str | int] = {} if eos is None else {"eos_token": eos}
        if name == TOKENIZER_CONFIG and _is_length(content.get("model_max_length")):
            changed["model_max_length"] = length
        if content | changed != content:
            write_json(path, content | changed)


def _is_length(value: Any) -> bool:
    return isinstance(value, int | float) and 0 < value < NO_LIMIT


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes a file as Hugging Face does."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
