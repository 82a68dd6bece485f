"""Text to token ids and back: bytes, the shipped BPE vocabularies, a tokenizer.json, or a Hugging Face tokenizer
directory.

A document becomes [BOS] + tokens + [EOS]. EOS is required, because it is what the end of a document predicts. BOS is
used only where the tokenizer itself would put one before a text: GPT-2-like vocabularies name a BOS that their models
never saw in that place.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np

from conf.files import Object, parse_json, read_json, read_text, user_path
from conf.words import cut, first_line, listed, show
from data.errors import DataError

EMBEDDED = Path(__file__).resolve().parent / "embedded"
SHIPPED = ("bpe-4k", "bpe-32k")
# What common vocabularies call their end of text, tried where no tokenizer_config.json names it.
EOS_NAMES = ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>", "<|end_of_sentence|>", "<|eot_id|>", "[EOS]")


class Tokenizer:
    """What every tokenizer offers.

    name: as given in data.tokenizer. vocab_size: ids are in [0, vocab_size). eos_id: int. bos_id: int or None.
    fingerprint: 16 hex digits, equal exactly if the ids of every text are. For chat templates (data/sft.py):
    special_tokens: text -> id. named_tokens: bos_token, eos_token, ... -> text. chat_template: jinja, or None.
    """

    name: str
    vocab_size: int
    bos_id: int | None
    eos_id: int
    fingerprint: str
    special_tokens: dict[str, int]
    named_tokens: dict[str, str]
    chat_template: str | None = None

    def encode(self, text: str) -> np.ndarray:
        """Ids of the text alone, without BOS and EOS: uint16 or uint32 (see `dtype`). Special tokens that are spelt out
        in the text are encoded as the characters they are."""
        raise NotImplementedError

    def decode(self, ids) -> str:
        """The text of `ids`; BOS, EOS and other special tokens leave nothing."""
        raise NotImplementedError

    def text_of(self, token: int) -> str:
        """How a special token is written; of another its number."""
        return next((text for text, number in self.special_tokens.items() if number == token), str(token))

    @property
    def dtype(self) -> np.dtype:
        """Smallest unsigned dtype that holds every id: that of token shards."""
        return np.dtype("<u2" if self.vocab_size <= 1 << 16 else "<u4")

    def document(self, text: str) -> np.ndarray:
        """[BOS] + tokens + [EOS] of one document, in `dtype`."""
        head = [] if self.bos_id is None else [self.bos_id]
        return np.concatenate([np.array(head, self.dtype), self.encode(text), np.array([self.eos_id], self.dtype)])


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes: ids 0-255, BOS 256, EOS 257. Needs no file and no training."""

    def __init__(self):
        self.name, self.vocab_size, self.bos_id, self.eos_id = "bytes", 258, 256, 257
        self.fingerprint = _fingerprint(b"bytes v1", self.bos_id, self.eos_id)
        self.special_tokens = {"<s>": 256, "</s>": 257}
        self.named_tokens = {"bos_token": "<s>", "eos_token": "</s>"}

    def encode(self, text: str) -> np.ndarray:
        # A lone surrogate (possible in JSON) has no UTF-8; it becomes "?".
        return np.frombuffer(text.encode("utf-8", errors="replace"), dtype=np.uint8).astype(self.dtype)

    def decode(self, ids) -> str:
        return bytes(int(i) for i in ids if i < 256).decode("utf-8", errors="replace")


class FastTokenizer(Tokenizer):
    """A tokenizer of the `tokenizers` library. `identity` is what the fingerprint is taken of, beside BOS and EOS."""

    def __init__(
        self,
        name: str,
        backend,
        *,
        identity: bytes,
        bos_id: int | None,
        eos_id: int,
        named_tokens: dict[str, str] | None = None,
        chat_template: str | None = None,
    ):
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True
        self.name, self._backend, self.bos_id, self.eos_id = name, backend, bos_id, eos_id
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        self.fingerprint = _fingerprint(identity, bos_id, eos_id)
        added = backend.get_added_tokens_decoder().items()
        self.special_tokens = {token.content: number for number, token in added if token.special}
        own = {"bos_token": "" if bos_id is None else backend.id_to_token(bos_id)}
        self.named_tokens = own | {"eos_token": backend.id_to_token(eos_id)} | (named_tokens or {})
        self.chat_template = chat_template

    def encode(self, text: str) -> np.ndarray:
        text = text.encode("utf-8", errors="replace").decode("utf-8")
        return np.array(self._backend.encode(text, add_special_tokens=False).ids, dtype=self.dtype)

    def decode(self, ids) -> str:
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=True)


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer called `name`: `bytes`, `bpe-4k`, `bpe-32k`, a path to a tokenizer.json, or a directory with one.

    Raises DataError if there is no such tokenizer, it cannot be read, or its end-of-text token is not known.
    """
    if name == "bytes":
        return ByteTokenizer()
    path = EMBEDDED / f"{name}.json" if name in SHIPPED else user_path(name)
    if path.is_dir():
        return _from_directory(name, path)
    if path.is_file():
        return _from_file(name, path)
    raise DataError(
        f"data.tokenizer={name!r}: no such tokenizer. Choose bytes, {', '.join(SHIPPED)}, a path to a tokenizer.json, "
        "or a "
        f"directory that a Hugging Face tokenizer was saved in (hub names are not fetched: save_pretrained it first)"
    )


def _from_file(name: str, path: Path) -> FastTokenizer:
    """A tokenizer.json; the names of its EOS may stand in a tokenizer_config.json beside it."""
    from tokenizers import Tokenizer as Backend

    text = read_text(path, error=DataError, remedy=f"data.tokenizer={cut(name)} takes a tokenizer.json")
    raw = text.encode()
    parse_json(text, Object, where=path, error=DataError, remedy=f"data.tokenizer={cut(name)} takes a tokenizer.json")
    try:
        backend = Backend.from_str(text)
    except Exception as error:  # tokenizers raises bare Exception for a malformed file
        raise DataError(f"data.tokenizer={name!r}: {path} is not a tokenizer.json ({first_line(error)})") from error
    declared = _declared_eos(path.with_name("tokenizer_config.json"))
    candidates = [declared] if declared else EOS_NAMES
    eos_id = next((i for i in map(backend.token_to_id, candidates) if i is not None), None)
    beside = path.with_name("chat_template.jinja")
    template = read_text(beside, error=DataError) if beside.is_file() else None
    found = f"{path} with the special tokens {_special_tokens(backend)}"
    return _checked(name, backend, raw, eos_id, found, chat_template=template)


def _from_directory(name: str, path: Path) -> FastTokenizer:
    """A directory that save_pretrained wrote (or a model directory): transformers reads it, from local files only."""
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(str(path), local_files_only=True)
    except Exception as error:  # whatever a file there makes transformers or tokenizers stumble over
        why = "no tokenizer.json" if not (path / "tokenizer.json").is_file() else first_line(error)
        raise DataError(f"data.tokenizer={name!r}: no usable tokenizer in {path} ({why})") from error
    backend = getattr(loaded, "backend_tokenizer", None)
    if backend is None:
        raise DataError(
            f"data.tokenizer={name!r}: {path} holds a {type(loaded).__name__} without a tokenizer.json; needs one"
        )
    file = path / "tokenizer.json"
    identity = file.read_bytes() if file.is_file() else json.dumps(sorted(backend.get_vocab().items())).encode()
    named = {key: value for key, value in loaded.special_tokens_map.items() if isinstance(value, str)}
    template = loaded.chat_template
    if isinstance(template, dict):  # several, by name
        template = template.get("default")
    found = f"{path} with the special tokens {_special_tokens(backend)}"
    return _checked(name, backend, identity, loaded.eos_token_id, found, named_tokens=named, chat_template=template)


def _checked(name: str, backend, identity: bytes, eos_id: int | None, found: str, **chat) -> FastTokenizer:
    """The tokenizer with its BOS, or a DataError that says how to declare an EOS."""
    if eos_id is None:
        raise DataError(
            f"data.tokenizer={name!r}: which token ends a document is not known; found {found}. Put a "
            "tokenizer_config.json "
            f'beside it that names one of them: {{"eos_token": "<|endoftext|>"}}'
        )
    with_special = backend.encode("a").ids
    plain = backend.encode("a", add_special_tokens=False).ids
    adds_bos = len(with_special) > len(plain) and with_special[0] != plain[0]
    bos_id = with_special[0] if adds_bos else None
    return FastTokenizer(name, backend, identity=identity, bos_id=bos_id, eos_id=eos_id, **chat)


def _special_tokens(backend) -> str:
    return listed(token.content for token in backend.get_added_tokens_decoder().values() if token.special)


def _declared_eos(config: Path) -> str | None:
    """The eos_token of a tokenizer_config.json (a string, or a dict with its content); None if there is none."""
    if not config.is_file():
        return None
    token = read_json(config, Object, error=DataError).get("eos_token")
    name = token.get("content") if isinstance(token, dict) else token
    if name is not None and not isinstance(name, str):
        raise DataError(f"{config}: eos_token={show(token)} is not the text of a token")
    return name


def _fingerprint(identity: bytes, bos_id: int | None, eos_id: int) -> str:
    return hashlib.sha256(identity + f"|{bos_id}|{eos_id}".encode()).hexdigest()[:16]
