"""Writes a trained model as a Hugging Face checkpoint, which AutoModelForCausalLM.from_pretrained loads.

    python launch/export.py run=runs/moba_32k to=hf/moba_32k
    python launch/export.py run=runs/moba_32k/checkpoints/tokens_000000180092928 to=hf/sparse dtype=bf16
    python launch/export.py run=runs/moba_32k to=hf/alone remote_code=true

The architecture is that of the model it started from, or a plain Llama, Qwen2 or Qwen3, with the RoPE of the
checkpoint's stage. Loaded as it is, the model attends to everything; after `import moba.transformers`,
attn_implementation="moba" gives each layer the attention of that stage, or of the last one before that had MoBA:
config.json holds it. With remote_code=true the folder has this attention in a file of its own, and
from_pretrained(folder, trust_remote_code=True) needs torch and transformers alone. The tokenizer, the chat template
that the run was trained with, else the tokenizer's own, and generation settings come along.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:] = [str(ROOT)] + [p for p in sys.path if Path(p or ".").resolve() != ROOT / "launch"]

from conf.files import Object, read_json, user_path  # noqa: E402
from conf.numbers import format_length  # noqa: E402
from conf.schema import RunConfig  # noqa: E402
from conf.validate import from_yaml  # noqa: E402
from conf.words import listed  # noqa: E402
from data.errors import DataError  # noqa: E402
from data.sft import ChatEncoder, ChatTemplate, load_template  # noqa: E402
from data.tokenizer import EMBEDDED, SHIPPED, Tokenizer, load_tokenizer  # noqa: E402
from launch.cli import UsageError, exits_on, key_values  # noqa: E402
from moba.kinds import AttentionSpec  # noqa: E402
from moba.kinds.plan_file import read_plan  # noqa: E402
from train.checkpoint import checkpoint_dir  # noqa: E402
from train.checkpoint.store import CONFIG, CheckpointError, Saved, find, read, verify  # noqa: E402
from train.hf import hf_export, hf_metadata, remote_code, source_files  # noqa: E402
from train.hf.hf_metadata import GENERATION  # noqa: E402
from train.schedule import build_schedule, last_sparse  # noqa: E402

KEYS = {
    "run": "run directory (its newest checkpoint), or one checkpoint's directory",
    "to": "directory to write; must not exist, or be empty",
    "eos": "end-of-sequence token in other software (default: after training on conversations the end of an "
    "assistant turn, else the tokenizer's EOS)",
    "attention": "file of launch/tune_attention.py: what each layer has under attn_implementation=moba (default: as "
    "trained)",
    "remote_code": "true: the folder also has the attention as one file of Python, which transformers runs with "
    "trust_remote_code=True where this project is not installed (default: false)",
    "dtype": "bf16 or fp32 (default: the precision the run computed in). Checkpoints hold fp32",
}


@exits_on(CheckpointError, DataError, ValueError, OSError)
def main(argv: list[str] | None = None) -> None:
    """The command; see the module's text."""
    values = key_values(sys.argv[1:] if argv is None else argv, KEYS, about=__doc__, required=["run", "to"])
    to = user_path(values["to"])
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise UsageError(f"to={to}: exists and is not an empty directory")
    if values.get("dtype", "fp32") not in hf_export.DTYPES:
        raise UsageError(f"dtype={values['dtype']}: choose one of {', '.join(hf_export.DTYPES)}")
    if values.get("remote_code", "false") not in ("true", "false"):
        raise UsageError(f"remote_code={values['remote_code']}: choose true or false")
    checkpoint = find(user_path(values["run"]))
    verify(checkpoint, [f for f in checkpoint_dir.manifest(checkpoint) if not f.startswith(("optimizer", "rng"))])
    saved = read(checkpoint)
    dtype = values["dtype"] if "dtype" in values else saved.meta["precision"]
    config = from_yaml(saved.config_yaml, checkpoint / CONFIG)
    plan = read_plan(values["attention"], config.model.num_layers) if "attention" in values else None
    tokenizer, description = describe(saved, config, dtype, plan)
    template = chat_template(config, tokenizer)
    eos = ends_of_text(config, tokenizer, template, values.get("eos"))
    own_end = None if eos == [tokenizer.eos_id] else eos  # None: as the tokenizer, or the original, says
    if own_end is not None:
        description["eos_token_id"] = hf_metadata.ids(own_end)
    length, beside = description["max_position_embeddings"], user_path(tokenizer.name) / GENERATION
    original = source_files.model_file(checkpoint, GENERATION) or (beside if beside.is_file() else None)
    old_length = config.model.pretrained_length
    generation = hf_metadata.generation_config(original, eos=own_end, old_length=old_length, length=length)
    # Filled under another name, so that an interrupted export is not taken for a model.
    temporary = to.with_name(f".{to.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise UsageError(f"to={values['to']}: cannot be made ({error.strerror}); choose another") from None
    if values.get("remote_code") == "true":
        architecture = description["architectures"][0]
        description["auto_map"] = remote_code.auto_map(architecture)
        (temporary / remote_code.FILE).write_text(remote_code.source(architecture), encoding="utf-8")
    hf_metadata.write_json(temporary / "config.json", hf_metadata.with_both_ropes(description))
    save_tokenizer(tokenizer, temporary, None if config.data.chat_template is None else template)
    hf_metadata.finish_tokenizer(
        temporary, eos=None if own_end is None else tokenizer.text_of(own_end[0]), length=length
    )
    if generation is not None:
        hf_metadata.write_json(temporary / GENERATION, generation)
    elif original is not None:
        shutil.copyfile(original, temporary / GENERATION)
    files = hf_export.write_weights(checkpoint, temporary, saved.meta["parameters"], dtype)
    for path in temporary.iterdir():
        checkpoint_dir.share(path)
    if to.exists():
        to.rmdir()
    temporary.rename(to)
    ends = ", ".join(map(tokenizer.text_of, eos))
    print(
        f"{checkpoint} -> {to}: {description['architectures'][0]}, {dtype}, {len(files)} file(s) of weights, context "
        f"{format_length(length)}, EOS {ends}"
    )


def chat_template(config: RunConfig, tokenizer: Tokenizer) -> ChatTemplate | None:
    """The template of the run's conversations; None if it has neither conversations nor a template of its own."""
    is_chat = any(source.is_chat for source in config.data.sources.values())
    own = config.data.chat_template
    return load_template(own, tokenizer) if is_chat or own is not None else None


def ends_of_text(
    config: RunConfig, tokenizer: Tokenizer, template: ChatTemplate | None, asked: str | None
) -> list[int]:
    """The tokens at which other software is to stop: first the one that a text of this model's training ends with."""
    if asked is not None:
        token = tokenizer.special_tokens.get(asked)
        if token is None:
            raise UsageError(
                f"eos={asked}: not a special token of the tokenizer, which has {listed(tokenizer.special_tokens)}"
            )
        return list(dict.fromkeys([token, tokenizer.eos_id]))
    if template is None:
        return [tokenizer.eos_id]
    return list(dict.fromkeys([ChatEncoder(tokenizer, template).end_of_turn(), tokenizer.eos_id]))


def describe(
    saved: Saved, config: RunConfig, dtype: str, plan: Sequence[AttentionSpec] | None = None
) -> tuple[Tokenizer, dict]:
    """`(tokenizer, content of config.json)` of a checkpoint of ours, whose run had this configuration. `plan` is what
    attn_implementation="moba" is to do, None: as trained."""
    tokenizer = load_tokenizer(source_files.tokenizer_name(config, saved.path))
    # A checkpoint at a stage's end belongs to that stage, though the next step would be of the next one.
    schedule = build_schedule(config)
    stage = schedule.lookup(saved.tokens - 1)
    description = hf_export.config_json(
        config.model,
        num_embeddings=saved.meta["parameters"]["model.embed_tokens.weight"][0],
        rope=stage.rope,
        attention=stage.attention,
        plan=plan or last_sparse(schedule.stages[: stage.index + 1]) or stage.attention,
        max_length=max(past.seq_len for past in schedule.stages[: stage.index + 1]),
        dtype=dtype,
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_id,
    )
    original = source_files.model_file(saved.path, "config.json")
    if original is None:
        return tokenizer, description
    came = read_json(
        original,
        Object,
        remedy="It was copied from the model that the run started from; remove it to export without it",
    )
    return tokenizer, hf_export.as_it_came(came, description)


def save_tokenizer(tokenizer: Tokenizer, to: Path, template: ChatTemplate | None = None) -> None:
    """Writes a tokenizer into `to` such that AutoTokenizer loads it: its own files, or equal ones where it has none;
    with `template` in place of its chat template."""
    _save_files(tokenizer, to)
    if template is not None:
        (to / "chat_template.json").unlink(missing_ok=True)
        (to / "chat_template.jinja").write_text(template.source, encoding="utf-8")


def _save_files(tokenizer: Tokenizer, to: Path) -> None:
    path = user_path(tokenizer.name)
    if tokenizer.name != "bytes" and tokenizer.name not in SHIPPED and path.is_dir():
        for name in (*source_files.TOKENIZER_FILES, GENERATION):
            if (path / name).is_file():
                shutil.copyfile(path / name, to / name)
        return
    from tokenizers import Tokenizer as Backend
    from transformers import PreTrainedTokenizerFast

    file = EMBEDDED / f"{path}.json" if tokenizer.name in SHIPPED else path
    backend = byte_backend(tokenizer) if tokenizer.name == "bytes" else Backend.from_file(str(file))
    special = {"eos_token": backend.id_to_token(tokenizer.eos_id)}
    if tokenizer.bos_id is not None:
        special["bos_token"] = backend.id_to_token(tokenizer.bos_id)
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(to)
    if tokenizer.name != "bytes":
        shutil.copyfile(file, to / "tokenizer.json")  # byte for byte, so that its fingerprint stays


def byte_backend(tokenizer: Tokenizer):
    """The byte tokenizer as one of the `tokenizers` library: a BPE of the 256 bytes that merges nothing."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
    from tokenizers import Tokenizer as Backend

    # GPT-2's alphabet: printable bytes stand for themselves, the others for characters from 256 on, in order.
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in printable)
    letter = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    backend = Backend(models.BPE(vocab={letter[byte]: byte for byte in range(256)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in ("<|bos|>", "<|eos|>")])
    backend.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", pair="<|bos|> $A <|bos|> $B", special_tokens=[("<|bos|>", tokenizer.bos_id)]
    )
    return backend


if __name__ == "__main__":
    main()
