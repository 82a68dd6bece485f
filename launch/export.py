"""Writes a trained model as a Hugging Face checkpoint, which AutoModelForCausalLM.from_pretrained loads.

    python launch/export.py run=runs/moba_32k to=hf/moba_32k
    python launch/export.py run=runs/moba_32k/checkpoints/tokens_000000180092928 to=hf/sparse dtype=bf16

The architecture is that of the model it started from, or a plain Llama, Qwen2 or Qwen3, with the RoPE of the
checkpoint's stage. Loaded as it is, the model attends to everything; after `import moba.transformers`,
attn_implementation="moba" gives each layer the attention of that stage, or of the last one before that had MoBA:
config.json holds it. The tokenizer, the chat template that the run was trained with, else the tokenizer's own, and
generation settings come along.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:] = [str(ROOT)] + [p for p in sys.path if Path(p or ".").resolve() != ROOT / "launch"]

import yaml  # noqa: E402

from conf.schema import RunConfig  # noqa: E402
from conf.validate import freeze  # noqa: E402
from data.errors import DataError  # noqa: E402
from data.sft import ChatTemplate, load_template  # noqa: E402
from data.tokenizer import EMBEDDED, SHIPPED, Tokenizer, load_tokenizer  # noqa: E402
from launch.cli import UsageError, exits_on, key_values  # noqa: E402
from train.checkpoint import checkpoint_dir  # noqa: E402
from train.checkpoint.store import CheckpointError, Saved, find, read, verify  # noqa: E402
from train.hf import hf_export, source_files  # noqa: E402
from train.schedule import build_schedule, last_sparse  # noqa: E402

KEYS = {
    "run": "run directory (its newest checkpoint), or one checkpoint's directory",
    "to": "directory to write; must not exist, or be empty",
    "dtype": "bf16 or fp32 (default: the precision the run computed in). Checkpoints hold fp32",
}


@exits_on(CheckpointError, DataError, ValueError, OSError)
def main(argv: list[str] | None = None) -> None:
    """The command; see the module's text."""
    values = key_values(sys.argv[1:] if argv is None else argv, KEYS, about=__doc__, required=["run", "to"])
    to = Path(values["to"]).expanduser()
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise UsageError(f"to={to}: exists and is not an empty directory")
    if values.get("dtype", "fp32") not in hf_export.DTYPES:
        raise UsageError(f"dtype={values['dtype']}: choose one of {', '.join(hf_export.DTYPES)}")
    checkpoint = find(Path(values["run"]).expanduser())
    verify(checkpoint, [f for f in checkpoint_dir.manifest(checkpoint) if not f.startswith(("optimizer", "rng"))])
    saved = read(checkpoint)
    dtype = values.get("dtype", saved.meta["precision"])
    config = freeze(yaml.safe_load(saved.config_yaml))
    tokenizer, description = describe(saved, config, dtype)
    own = config.data.chat_template
    template = None if own is None else load_template(own, tokenizer)
    # Filled under another name, so that an interrupted export is not taken for a model.
    temporary = to.with_name(f".{to.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    generation = source_files.model_file(checkpoint, "generation_config.json")
    if generation is not None:
        shutil.copyfile(generation, temporary / generation.name)
    (temporary / "config.json").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    save_tokenizer(tokenizer, temporary, template)
    files = hf_export.write_weights(checkpoint, temporary, saved.meta["parameters"], dtype)
    if to.exists():
        to.rmdir()
    temporary.rename(to)
    print(f"{checkpoint} -> {to}: {description['architectures'][0]}, {dtype}, {len(files)} file(s) of weights")


def describe(saved: Saved, config: RunConfig, dtype: str) -> tuple[Tokenizer, dict]:
    """`(tokenizer, content of config.json)` of a checkpoint of ours, whose run had this configuration."""
    tokenizer = load_tokenizer(source_files.tokenizer_name(config, saved.path))
    # A checkpoint at a stage's end belongs to that stage, though the next step would be of the next one.
    schedule = build_schedule(config)
    stage = schedule.lookup(saved.tokens - 1)
    description = hf_export.config_json(
        config.model,
        num_embeddings=saved.meta["parameters"]["model.embed_tokens.weight"][0],
        rope=stage.rope,
        attention=stage.attention,
        plan=last_sparse(schedule.stages[: stage.index + 1]) or stage.attention,
        max_length=max(past.seq_len for past in schedule.stages[: stage.index + 1]),
        dtype=dtype,
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_id,
    )
    original = source_files.model_file(saved.path, "config.json")
    if original is None:
        return tokenizer, description
    return tokenizer, hf_export.as_it_came(json.loads(original.read_text(encoding="utf-8")), description)


def save_tokenizer(tokenizer: Tokenizer, to: Path, template: ChatTemplate | None = None) -> None:
    """Writes a tokenizer into `to` such that AutoTokenizer loads it: its own files, or equal ones where it has none;
    with `template` in place of its chat template."""
    _save_files(tokenizer, to)
    if template is not None:
        (to / "chat_template.json").unlink(missing_ok=True)
        (to / "chat_template.jinja").write_text(template.source, encoding="utf-8")


def _save_files(tokenizer: Tokenizer, to: Path) -> None:
    path = Path(tokenizer.name).expanduser()
    if tokenizer.name != "bytes" and tokenizer.name not in SHIPPED and path.is_dir():
        for name in (*source_files.TOKENIZER_FILES, "generation_config.json"):
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
