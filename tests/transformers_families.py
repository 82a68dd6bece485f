"""Holds `attn_implementation="moba"` against transformers' own attention in every causal language model that this
version of transformers knows and that can be built small.

    python tests/transformers_families.py to=docs/results/transformers_families.json table=docs/transformers.md \\
        families=llama,gemma3_text seconds=30

Each family is a random model in float32 of a few layers, in a process of its own with a time limit. It is loaded with
moba's attention, and a second one is switched to it by `configure`. With all blocks selected, logits, the gradient of
every weight, logits of a batch padded on the left, and those of decoding step by step have to be those of eager
attention; with two blocks a query, those of a dense mask that is made here. `to` gets all results; families that are
there already and not named are kept. `table` gets them below its line "<!-- families -->". All take about a minute on
one core.

Outcomes: right; refused (a ValueError that names moba); WRONG (other numbers, or moba's attention was not reached);
ERROR (any other exception); not built, with the reason.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import multiprocessing
import re
import sys
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import transformers  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from transformers import CONFIG_MAPPING as CONFIGS  # noqa: E402
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, DynamicCache  # noqa: E402
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as FAMILIES  # noqa: E402

import moba.transformers  # noqa: E402
from moba.hf_layout import OTHERWISE, REFUSES  # noqa: E402

LENGTH, VOCAB, LAYERS = 40, 97, 4
BLOCK, TOP_K = 4, 2
TOLERANCE = 1e-4
"""Largest difference from eager, as a share of the largest magnitude there: float32 rounding is 1e-6 and less, another
block or a lost mask 1e-2 and more."""
MOST_PARAMETERS = 20_000_000
REFERENCE = "dense_moba"

# The first pattern that matches a whole-number field says its value.
SIZES: list[tuple[str, int]] = [
    (r"num_key_value_heads|num_kv_heads|.*_kv_heads|num_query_groups|.*num_key_value_groups", 2),
    (r".*(num|n)_(attention_)?heads?|num_attention_heads.*|n_heads?|.*attention_heads|.*num_heads", 4),
    (r"(?!qk_head_dim).*head_dim|d_kv|kv_channels|d_head", 8),
    (r".*vocab_size.*", VOCAB),
    (r"hidden_size|d_model|n_embd|dim|embed_dim|embedding_size|word_embed_proj_dim|hidden_dim", 32),
    (r".*lora_rank", 16),
    (r".*intermediate_size.*|.*ffn_dim|d_ff|n_inner|.*ffn_hidden_size|inner_dim", 48),
    (r"num_hidden_layers|n_layers?|num_layers|decoder_layers|encoder_layers|n_layer", LAYERS),
    (r"(num|n)_(local_|routed_)?experts|.*num_experts|moe_num_experts", 4),
    (r".*experts_per_tok.*|num_selected_experts|moe_top_?k|moe_topk|top_k_experts", 2),
    (r"n_group|topk_group|num_expert_group.*", 1),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq_len|original_max_position_embeddings", 256),
    (r".*hidden_size_per_layer_input", 8),
]
# What the patterns cannot know.
HYBRID = ["linear_attention", "full_attention"] * 2
SLIDING = ["sliding_attention", "full_attention"] * 2
DSA = {"index_n_heads": 4, "index_head_dim": 16, "index_topk": 64}
GEMMA = {"num_hidden_layers": LAYERS, "layer_types": SLIDING, "num_kv_shared_layers": 0, "global_head_dim": 8}
OWN: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"layer_group_size": 2, "num_nextn_predict_layers": 0},
    "bamba": {"attn_layer_indices": [1, 3]},
    "codegen": {"rotary_dim": 4},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}},
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 48},
    },
    "dots1": {"n_shared_experts": 1, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "ernie4_5_moe": {"moe_k": 2},
    "gemma3n_text": GEMMA | {"intermediate_size": 48, "laurel_rank": 8, "activation_sparsity_pattern": [0.0] * LAYERS},
    "gemma4_text": GEMMA,
    "gemma4_unified_text": GEMMA,
    "glm_moe_dsa": DSA,
    "deepseek_v2": {"num_experts_per_tok": 2, "topk_group": 1, "n_group": 1, "n_routed_experts": 4},
    "deepseek_v32": DSA,
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "gptj": {"rotary_dim": 4},
    "granitemoehybrid": {"layer_types": HYBRID},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8, "moe_topk": 2, "num_experts": 4},
    "inkling_text": {"swa_num_key_value_heads": 2},
    "inkling2_text": {"swa_num_key_value_heads": 2},
    "inkling2_loop_text": {"swa_num_key_value_heads": 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"layer_types": HYBRID},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "longcat_flash": {"zero_expert_num": 2, "n_routed_experts": 4},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 2},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
    "nemotron_h": {"n_groups": 2},
    "qwen2_moe": {"sliding_window": 4096},
    "qwen4_exp_text": {
        "indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 64,
        "indexer_compress_ratio": 4, "linear_num_key_heads": 4, "linear_num_value_heads": 4, "ple_embed_dim": None,
        "ngram_vocab_size_base": 97, "hc_lowrank": 8,
    },
    "reformer": {"is_decoder": True, "axial_pos_embds": False, "attn_layers": ["local"] * 2, "attention_head_size": 8},
    "xlm": {"emb_dim": 32, "n_layers": LAYERS, "n_heads": 4},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 6, "attn_layer_period": 3, "attn_layer_offset": 1},
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2, "attention_head_dim": 16, "n_mamba_heads": 8,
        "mamba_headdim": 8, "num_mem_blocks": 1,
    },
}  # fmt: skip


class NotBuilt(Exception):
    """Why a family has no small model here."""


def small_config(config_class: type, own: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    """Arguments of a small configuration of this class, those of the configurations inside it included."""
    try:
        values = vars(config_class())
    except Exception:  # one that cannot be made without arguments
        values = {}
    inner = getattr(config_class, "sub_configs", {})
    arguments: dict[str, Any] = {}
    for field in dataclasses.fields(config_class):
        default = None if field.default is dataclasses.MISSING else field.default
        value = values.get(field.name, default)
        if field.name in inner:
            if value is not None and inner[field.name] is not transformers.AutoConfig:
                arguments[field.name] = small_config(type(value), **changes)
            elif value is not None:
                arguments[field.name] = {"model_type": value.model_type, **small_config(type(value), **changes)}
            continue
        if field.name.endswith("token_id") and isinstance(value, int) and value >= VOCAB:
            arguments[field.name] = 3
        if isinstance(value, float) and "drop" in field.name:
            arguments[field.name] = 0.0
        if not isinstance(value, int) or isinstance(value, bool):
            continue
        for pattern, size in SIZES:
            if re.fullmatch(pattern, field.name):
                arguments[field.name] = min(value, size)
                break
    if "kv_lora_rank" in arguments and "num_key_value_heads" in arguments:  # latent attention has no groups
        arguments["num_key_value_heads"] = arguments["num_attention_heads"]
    known = {field.name for field in dataclasses.fields(config_class)}
    arguments |= {key: value for key, value in changes.items() if key in known}
    return arguments | (own or {})


def build(family: str, attention: str) -> nn.Module:
    """A small random model of a family, always the same; NotBuilt with the reason."""
    own = OWN.get(family, {})
    try:
        config = CONFIGS[family](**small_config(CONFIGS[family], own))
        for one in {id(c): c for c in (config, config.get_text_config(decoder=True))}.values():
            one.is_decoder = True
            one.use_cache = False
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        count = sum(p.numel() for p in model.parameters())
    except Exception as error:
        raise NotBuilt(f"{type(error).__name__}: {error}") from error
    if count > MOST_PARAMETERS:
        raise NotBuilt(f"{count:,} parameters")
    torch.manual_seed(0)
    if attention == moba.transformers.NAME:
        text = config.get_text_config()
        setattr(text, attention, {"plan": plan(text, dense=True)})
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).float().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            # Large enough for attention to matter; keys that are scaled by zeros would score all blocks the same.
            if parameter.dim() > 1 or not bool(parameter.any()):
                parameter.copy_(noise * 0.2)
    return model


def plan(config: Any, dense: bool) -> list[list[Any]]:
    """MoBA in every layer, with all blocks or with few."""
    layers = getattr(config, "decoder_layers", None) or config.num_hidden_layers
    return [["moba", BLOCK, LENGTH // BLOCK + 1 if dense else TOP_K]] * layers


def dense_moba(module, query, key, value, attention_mask, scaling=None, **_) -> tuple[Tensor, None]:
    """MoBA by its definition, with one dense mask: the own block, and the best of the complete earlier ones."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    length = key.shape[2]
    block = torch.arange(length) // BLOCK
    means = torch.stack([key[:, :, block == b].mean(2) for b in range(int(block[-1]) + 1)], dim=2)
    earlier = torch.arange(means.shape[2])[None] < block[:, None]
    gate = (query @ means.transpose(2, 3)).masked_fill(~earlier, float("-inf"))
    best = gate.topk(min(TOP_K - 1, gate.shape[-1]), dim=-1).indices
    picked = torch.zeros_like(gate, dtype=torch.bool).scatter(-1, best, True) & earlier
    picked |= torch.arange(means.shape[2])[None] == block[:, None]
    seen = picked[..., block] & torch.ones(length, length, dtype=torch.bool).tril()
    scores = (query @ key.transpose(2, 3)) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    return (scores.masked_fill(~seen, float("-inf")).softmax(-1) @ value).transpose(1, 2).contiguous(), None


AttentionInterface.register(REFERENCE, dense_moba)
AttentionMaskInterface.register(REFERENCE, lambda **_: None)


def apart(found: Tensor, expected: Tensor) -> float:
    """Largest difference as a share of the largest magnitude; infinite where something is not finite."""
    scale = max(float(expected.abs().max()), 1e-30)
    difference = float((found - expected).abs().max()) / scale
    return difference if difference == difference else float("inf")


def ids_of(rows: int = 2) -> Tensor:
    return torch.randint(4, VOCAB, (rows, LENGTH), generator=torch.Generator().manual_seed(1))


def logits_and_gradients(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    """Of a plain batch."""
    model.zero_grad()
    logits = model(ids_of(), use_cache=False).logits
    logits.float().logsumexp(-1).square().mean().backward()
    return logits.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def padded_logits(model: nn.Module, padding: int = 3) -> Tensor:
    """Logits at the real tokens of a batch padded on the left with this token."""
    ids, mask = ids_of(), torch.ones(2, LENGTH, dtype=torch.int64)
    mask[1, :7], ids[1, :7] = 0, padding
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        takes = "position_ids" in inspect.signature(model.forward).parameters
        more = {"position_ids": positions} if takes else {}
        logits = model(ids, attention_mask=mask, use_cache=False, **more).logits
    return torch.cat([logits[0], logits[1, 7:]])


def decoded_logits(model: nn.Module) -> Tensor:
    """Logits of a prompt, a chunk and two steps over one cache."""
    ids, start, found = ids_of(), 0, []
    cache = DynamicCache(config=model.config)
    with torch.no_grad(), moba.transformers.prompt(LENGTH - 2):
        for stop in (LENGTH - 6, LENGTH - 2, LENGTH - 1, LENGTH):
            found.append(model(ids[:, start:stop], past_key_values=cache, use_cache=True).logits)
            start = stop
    return torch.cat(found, dim=1)


def outcome(run, expected) -> tuple[str, str]:
    """(outcome, what speaks for it) of run(), which returns the difference from what is expected."""
    try:
        difference = run()
    except ValueError as error:
        known = "moba" in str(error).lower()
        return ("refused" if known else "ERROR"), " ".join(f"{'' if known else 'ValueError: '}{error}".split())
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        return "ERROR", f"{type(error).__name__}: {' '.join(str(error).split())[:200]} ({Path(place.filename).name})"
    return ("right" if difference <= TOLERANCE else "WRONG"), f"{difference:.1e}"


def measure(family: str) -> dict[str, Any]:
    """Outcomes of a family by check, and the one of all."""
    eager = build(family, "eager")
    try:
        expected, expected_gradients = logits_and_gradients(eager)
        if not bool(expected.isfinite().all()):
            raise NotBuilt("logits of eager attention are not finite")
    except NotBuilt:
        raise
    except Exception as error:
        raise NotBuilt(f"eager attention: {type(error).__name__}: {error}") from error
    changed = ids_of()
    changed[:, -1] = (changed[:, -1] + 1) % VOCAB
    with torch.no_grad():
        causal = apart(eager(changed, use_cache=False).logits[:, :-1], expected[:, :-1]) < TOLERANCE
    result: dict[str, Any] = {"parameters": sum(p.numel() for p in eager.parameters()), "causal": causal}

    def plain(model):
        logits, gradients = logits_and_gradients(model)
        assert gradients.keys() == expected_gradients.keys(), "other weights have gradients"
        scale = max(float(g.abs().max()) for g in expected_gradients.values())
        off = max(float((gradients[n] - g).abs().max()) for n, g in expected_gradients.items()) / scale
        return max(apart(logits, expected), off)

    def loaded():
        return plain(build(family, moba.transformers.NAME))

    switched = build(family, "eager")

    def configured(dense=True):
        text = switched.config.get_text_config()
        moba.transformers.configure(switched, plan=plan(text, dense))

    def by_configure():
        configured()
        return plain(switched)

    checks = {"loaded": outcome(loaded, expected), "configured": outcome(by_configure, expected)}
    if checks["configured"][0] == "right":

        def sparse():
            configured(dense=False)
            with torch.no_grad():
                found = switched(ids_of(), use_cache=False).logits
            if apart(found, expected) < TOLERANCE:
                return float("inf")  # moba's attention was not used
            eager.set_attn_implementation(REFERENCE)
            with torch.no_grad():
                reference = eager(ids_of(), use_cache=False).logits
            eager.set_attn_implementation("eager")
            return apart(found, reference)

        checks["sparse"] = outcome(sparse, expected)
        configured()
        for name, logits in (("padded", padded_logits), ("decoded", decoded_logits)):
            try:
                wanted = logits(eager)
                if logits is padded_logits and apart(padded_logits(eager, padding=5), wanted) > TOLERANCE:
                    raise RuntimeError("padding changes the text's logits")
            except Exception as error:
                checks[name] = ("not comparable", f"eager attention: {type(error).__name__}: {str(error)[:80]}")
                continue
            checks[name] = outcome(lambda logits=logits, wanted=wanted: apart(logits(switched), wanted), expected)
    found = [one for one, _ in checks.values()]
    worst = next((bad for bad in ("WRONG", "ERROR") if bad in found), None)
    return result | {"outcome": worst or found[1], "checks": checks}


def work(family: str, connection) -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    try:
        result = measure(family)
    except NotBuilt as error:
        result = {"outcome": "not built", "why": " ".join(str(error).split())[:300]}
    except Exception as error:
        result = {"outcome": "ERROR", "why": f"{type(error).__name__}: {error} {traceback.format_exc()[-600:]}"}
    connection.send(result)


def in_a_process(family: str, seconds: float) -> dict[str, Any]:
    """What `measure` finds, in a fork of this process with a time limit."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=work, args=(family, sender), daemon=True)
    process.start()
    sender.close()
    try:
        if receiver.poll(seconds):
            return receiver.recv()
        return {"outcome": "not built", "why": f"took more than {seconds:g} s"}
    except EOFError:
        return {"outcome": "not built", "why": "the process ended"}
    finally:
        process.kill()
        process.join()


MARK = "<!-- families -->\n"
CHECKS = {"configured": "logits, gradients", "sparse": "sparse", "padded": "padded", "decoded": "decoded"}


def table(results: dict[str, dict[str, Any]]) -> str:
    """Markdown: how many families have which outcome, and a line for each."""
    outcomes = Counter(one["outcome"] for one in results.values())
    lines = [
        f"transformers {transformers.__version__}, {len(results)} families of causal language models: "
        + ", ".join(f"{number} {outcome}" for outcome, number in outcomes.most_common())
        + f". Differences from eager attention, as a share of the largest magnitude; right is at most {TOLERANCE:g}.",
        "",
        "| family | | " + " | ".join(CHECKS.values()) + " |",
        "|---" * (len(CHECKS) + 2) + "|",
    ]
    for family, one in results.items():
        checks = one.get("checks", {})
        cells = [cell(*checks[name]) if name in checks else "" for name in CHECKS]
        if one["outcome"] == "not built":
            cells = [cell("not built", one["why"]), *[""] * (len(CHECKS) - 1)]
        lines.append(f"| {family} | {one['outcome']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def cell(found: str, text: str) -> str:
    """A difference, or a reason without what all reasons have in common."""
    if found == "right":
        return text
    text = text.replace(f"{REFUSES} ", "").replace(OTHERWISE, "").replace("|", "/")
    text = text.encode("ascii", "replace").decode()
    return f"{found}: {text[:150]}" if found not in ("refused", "not built") else text[:150]


def main(arguments: list[str]) -> int:
    given = dict(argument.split("=", 1) for argument in arguments)
    to = Path(given["to"])
    results = json.loads(to.read_text()) if to.exists() else {}
    for family in given["families"].split(",") if "families" in given else list(FAMILIES):
        results[family] = in_a_process(family, float(given.get("seconds", 30)))
        print(f"{family}: {results[family]['outcome']}", flush=True)
        results = dict(sorted(results.items()))
        lines = [f"{json.dumps(name)}: {json.dumps(one)}" for name, one in results.items()]
        to.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    if "table" in given:
        page = Path(given["table"])
        text, mark, _ = page.read_text(encoding="utf-8").partition(MARK)
        page.write_text(text + mark + "\n" + table(results), encoding="utf-8")
    print(
        ", ".join(f"{number} {outcome}" for outcome, number in Counter(r["outcome"] for r in results.values()).items())
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
