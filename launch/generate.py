"""Continues a text with a trained model and streams the continuation to standard output.

    python launch/generate.py run=runs/quickstart prompt="It was the best of times"
    python launch/generate.py run=runs/moba_32k prompt_file=book.txt attn=moba temperature=0
    python launch/generate.py run=models/SmolLM2-135M attn_prefill=128x8

    python launch/generate.py run=runs/sft_hybrid chat=true prompt_file=question.txt

Without a prompt, each line of the standard input is one. Attention can be chosen for both, or separately for reading
the prompt and for the new tokens: by default the prompt is read as the model was trained, and new tokens see
everything.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

ROOT = Path(__file__).resolve().parents[1]
sys.path[:] = [str(ROOT)] + [p for p in sys.path if Path(p or ".").resolve() != ROOT / "launch"]

from conf.files import read_text, user_path  # noqa: E402
from conf.numbers import format_length  # noqa: E402
from data.errors import DataError  # noqa: E402
from data.sft import ChatEncoder, load_template  # noqa: E402
from data.tokenizer import Tokenizer, load_tokenizer  # noqa: E402
from evals.loading import DENSE, TrainedModel, attention_plan, load_trained  # noqa: E402
from launch.cli import UsageError, exits_on, key_values  # noqa: E402
from train.checkpoint.store import CheckpointError  # noqa: E402
from train.model.generation import Sampling, TextStream, generate  # noqa: E402

N = TypeVar("N", int, float)
KEYS = {
    "run": "run directory (its newest checkpoint), one checkpoint's directory, or a Hugging Face directory",
    "prompt": "the text to continue",
    "prompt_file": "a UTF-8 text file with the prompt",
    "chat": "true: the prompt is a user message to be answered, formatted by the run's data.chat_template",
    "max_new_tokens": "tokens to write at most (default 200)",
    "temperature": "0 takes the most likely token, 1 samples from the model's probabilities (default 0.8)",
    "top_k": "sample from this many most likely tokens (default 0: all)",
    "top_p": "sample from the most likely tokens with this total probability (default 0.95)",
    "seed": "random seed (default 0), the same for every prompt",
    "attn": "stage (of the checkpoint's stage), moba (of the last stage with MoBA), full, <block "
    "size>x<top_k> (512x3), 512x3+1 with the "
    "first block always selected, or a file of launch/tune_attention.py",
    "attn_prefill": "the same, only for reading the prompt (default: attn, else stage)",
    "attn_decode": "the same, only for new tokens (default: attn, else full)",
    "device": "auto (default), cpu or cuda",
}


@exits_on(CheckpointError, DataError, ValueError, OSError)
def main(argv: list[str] | None = None) -> None:
    """The command; see the module's text."""
    values = key_values(sys.argv[1:] if argv is None else argv, KEYS, about=__doc__, required=["run"])
    if "prompt" in values and "prompt_file" in values:
        raise UsageError("prompt and prompt_file are both given: choose one")
    sampling = Sampling(
        temperature=_number(values, "temperature", 0.8, float),
        top_k=_number(values, "top_k", 0, int),
        top_p=_number(values, "top_p", 0.95, float),
        seed=_number(values, "seed", 0, int),
    )
    max_new_tokens = _number(values, "max_new_tokens", 200, int)
    if max_new_tokens < 1:
        raise UsageError(f"max_new_tokens={max_new_tokens}: must be a whole number of at least 1")
    trained = load_trained(values["run"], values.get("device", "auto"))
    tokenizer = load_tokenizer(trained.config.data.tokenizer)
    options = {
        "max_new_tokens": max_new_tokens,
        "sampling": sampling,
        "prefill": attention_plan(values.get("attn_prefill", values.get("attn", "stage")), trained),
        "decode": attention_plan(values.get("attn_decode", values.get("attn", DENSE)), trained),
    }
    if values.get("chat", "false") not in ("true", "false"):
        raise UsageError(f"chat={values['chat']!r}: true or false")
    is_chat = values.get("chat") == "true"
    chat = ChatEncoder(tokenizer, load_template(trained.config.data.chat_template, tokenizer)) if is_chat else None
    for prompt in _prompts(values):
        for piece in continuation(trained, tokenizer, prompt, chat, **options):
            print(piece, end="", flush=True)
        print(flush=True)


def continuation(
    trained: TrainedModel, tokenizer: Tokenizer, prompt: str, chat: ChatEncoder | None = None, **options
) -> Iterator[str]:
    """The text behind the prompt in pieces of whole characters, up to the model's end of text; with `chat`, the answer
    to the prompt, up to the end of the turn. options: as for `generate`. Says on the standard error if the text may
    grow longer than the model was trained for."""
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    ids = bos + tokenizer.encode(prompt).tolist()
    if chat is not None:
        ids = chat.prompt([{"role": "user", "content": prompt}])
    if not ids:
        raise UsageError("the prompt is empty, and this model's tokenizer has no BOS to start from: pass some text")
    longest = len(ids) + options["max_new_tokens"]
    if longest > trained.stage.seq_len:
        trained_for = format_length(trained.stage.seq_len)
        print(f"note: up to {longest} tokens for a model trained on {trained_for}", file=sys.stderr)
    stream = TextStream(tokenizer, before=ids)
    stop = {tokenizer.eos_id} if chat is None else {tokenizer.eos_id, chat.end_of_turn()}
    for token in generate(trained.model, ids, vocab_size=tokenizer.vocab_size, stop=stop, **options):
        yield stream.add(token)
    yield stream.rest()


def _prompts(values: dict[str, str]) -> Iterator[str]:
    """The one that was given, or the lines of the standard input as they come."""
    if "prompt" in values:
        yield values["prompt"]
    elif "prompt_file" in values:
        yield read_text(user_path(values["prompt_file"]), remedy="prompt_file= takes a text file")
    else:
        for line in iter(_next_line, ""):
            if line.strip():
                yield line.rstrip("\n")


def _next_line() -> str:
    """A line of the standard input, asked for if a person sits there; empty at its end."""
    if sys.stdin.isatty():
        print("> ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline()


def _number(values: dict[str, str], key: str, default: N, kind: type[N]) -> N:
    """The number given for `key`; UsageError if it is none."""
    try:
        return kind(values.get(key, default))
    except ValueError:
        what = "a whole number" if kind is int else "a number"
        raise UsageError(f"{key}={values[key]}: must be {what}") from None


if __name__ == "__main__":
    main()
