"""Tokenizers: round trips, what a document becomes, fingerprints, and the messages for unusable ones."""

import json
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from data.errors import DataError
from data.tokenizer import EMBEDDED, load_tokenizer

SHIPPED = {name: load_tokenizer(name) for name in ("bytes", "bpe-4k", "bpe-32k")}


@settings(deadline=None, max_examples=50)
@given(st.sampled_from(sorted(SHIPPED)), st.text())
def test_round_trip(name, text):
    """Catches any text (control characters, emoji, spelt-out special tokens) that does not survive encoding."""
    tokenizer = SHIPPED[name]
    document = tokenizer.document(text + "<|endoftext|>")
    assert tokenizer.decode(document) == text + "<|endoftext|>"
    assert document[-1] == tokenizer.eos_id and (document[:-1] != tokenizer.eos_id).all()
    assert document.dtype == np.uint16 and document.max() < tokenizer.vocab_size
    assert (document[0] == 256) == (name == "bytes")


def test_shipped_vocabularies():
    """Catches a shipped file that was swapped or retrained: checkpoints depend on these."""
    assert {name: (t.vocab_size, t.bos_id, t.eos_id, t.fingerprint) for name, t in SHIPPED.items()} == {
        "bytes": (258, 256, 257, "8adbec6019bc59cc"),
        "bpe-4k": (4096, None, 0, "19962be806eeee78"),
        "bpe-32k": (32768, None, 0, "7e441d83d60be2e7"),
    }


def test_lone_surrogate_becomes_a_question_mark():
    """Catches a crash in the middle of a corpus: JSON may spell half a surrogate pair, which has no UTF-8."""
    for tokenizer in SHIPPED.values():
        assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a?b"


def test_files_and_directories(tmp_path):
    """Catches a path that is read otherwise than the shipped name, and a fingerprint that depends on the place."""
    path = shutil.copy(EMBEDDED / "bpe-4k.json", tmp_path / "tokenizer.json")
    assert load_tokenizer(str(path)).fingerprint == SHIPPED["bpe-4k"].fingerprint
    saved = PreTrainedTokenizerFast(tokenizer_file=str(path), eos_token="<|pad|>")
    saved.save_pretrained(tmp_path / "saved")
    loaded = load_tokenizer(str(tmp_path / "saved"))
    assert (loaded.eos_id, loaded.bos_id) == (1, None)
    assert loaded.fingerprint != SHIPPED["bpe-4k"].fingerprint  # another end of text, other documents
    assert (loaded.encode("Call me Ishmael.") == SHIPPED["bpe-4k"].encode("Call me Ishmael.")).all()


def test_bos_only_where_the_tokenizer_puts_one(tmp_path):
    """Catches a BOS that a model of this tokenizer never saw, and one left out that it always saw."""
    backend = Backend.from_file(str(EMBEDDED / "bpe-4k.json"))
    backend.post_processor = TemplateProcessing(single="<|pad|> $A", special_tokens=[("<|pad|>", 1)])
    backend.save(str(tmp_path / "with_bos.json"))
    tokenizer = load_tokenizer(str(tmp_path / "with_bos.json"))
    assert tokenizer.bos_id == 1
    assert tokenizer.document("x").tolist() == [1, *SHIPPED["bpe-4k"].document("x").tolist()]


def test_unknown_end_of_text(tmp_path):
    """Catches a guessed EOS: the message says which tokens there are and how to name one, and doing so works."""
    raw = json.loads((EMBEDDED / "bpe-4k.json").read_text())
    raw["added_tokens"][0]["content"] = "<stop>"
    raw["model"]["vocab"]["<stop>"] = raw["model"]["vocab"].pop("<|endoftext|>")
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(raw))
    with pytest.raises(DataError, match=r"(?s)<stop>, <\|pad\|>.*tokenizer_config.json.*eos_token"):
        load_tokenizer(str(path))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "<stop>"}}')
    assert load_tokenizer(str(path)).eos_id == 0


def test_unusable_tokenizers(tmp_path):
    """Catches tracebacks of libraries in place of a message that names the key, the value and the choices."""
    (tmp_path / "broken.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    for name, named in (
        ("gpt5", "Choose bytes, bpe-4k, bpe-32k"),
        ("broken.json", "not a tokenizer.json"),
        ("empty", "no usable"),
    ):
        value = name if name == "gpt5" else str(tmp_path / name)
        with pytest.raises(DataError, match=f"(?s)data.tokenizer='{value}'.*{named}"):
            load_tokenizer(value)
