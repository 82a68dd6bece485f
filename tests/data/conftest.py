"""Files of a test, and configurations that point at them."""

import json

import pytest

from conf.schema import DataConfig, SourceConfig


@pytest.fixture
def write_jsonl(tmp_path):
    """write(name, rows) -> path of a jsonl file."""

    def write(name, rows):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


@pytest.fixture
def config_of(tmp_path):
    """config(tokenizer=..., **source fields) -> DataConfig with one source "main" and a cache of this test."""

    def config(tokenizer="bytes", **source):
        cache = str(tmp_path / "cache")
        return DataConfig(tokenizer=tokenizer, sources={"main": SourceConfig(**source)}, cache_dir=cache)

    return config
