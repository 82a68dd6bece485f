"""The plan's figures against sums done another way, and what it says when a run cannot fit."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from conf.hardware import Hardware
from conf.schema import DeepSpeedConfig, ModelConfig, SourceConfig
from conf.validate import freeze, to_dict
from launch.config import load
from moba.kinds import Full, Moba
from train.model.sizes import embedding_rows, num_parameters
from train.plan.describe import describe_layers
from train.plan.memory import estimate_memory
from train.plan.plan import make_plan

MODEL = {"hidden_size": 64, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2, "ffn_size": 96}
GB = 1024**3


def config_of(**stage):
    """Two stages at 256 tokens: `sparse` as given, then `full`."""
    sparse = {"tokens": "32K", "attention": {"block_size": 32, "top_k": 2}, **stage}
    stages = {"sparse": sparse, "full": {"tokens": "8K", "attention": {"kind": "full"}}}
    schedule = {"seq_len": 256, "batch_tokens": "1K", "stages": stages}
    return freeze({"model": MODEL, "data": {"sources": {"a": {"path": "a.txt"}}}, "schedule": schedule})


def known(lengths, usable=None) -> SimpleNamespace:
    """A source that is tokenised: of text, or of conversations of which `usable` inputs are used."""
    return SimpleNamespace(lengths=lengths, is_chat=usable is not None, usable_inputs=lambda seq_len: usable)


def dense_mask(length: int, block: int, top_k: int) -> torch.Tensor:
    """What a query sees if it picks the latest blocks: as many pairs as any other choice of as many blocks."""
    query, key = torch.arange(length)[:, None], torch.arange(length)[None]
    recent = query // block - key // block < top_k
    return (key <= query) & recent


def test_attended_share_counts_pairs():
    """Catches a share by blocks instead of pairs, the own block forgotten, full layers left out of a hybrid."""
    seen, causal = dense_mask(256, 32, 2).sum().item(), 256 * 257 // 2
    assert seen < causal, "some query must drop a block"
    plan = make_plan(config_of(), 384)
    assert [stage.attended_share for stage in plan.stages] == [pytest.approx(seen / causal), 1.0]
    hybrid = make_plan(config_of(attention={"block_size": 32, "top_k": 2, "full_last": 1}), 384)
    assert hybrid.stages[0].attended_share == pytest.approx((2 * seen + causal) / (3 * causal))


def test_flops_count_products():
    """Catches a wrong factor: 6 per weight and token, 12 per pair, head and channel, per layer."""
    plan = make_plan(config_of(), 384)
    sparse, full = plan.stages
    weights = 3 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96) + 384 * 64
    causal = 256 * 257 // 2
    assert full.flops == full.dense_flops == full.tokens * 6 * weights + full.tokens // 256 * 3 * causal * 12 * 4 * 16
    pairs = dense_mask(256, 32, 2).sum().item()
    assert sparse.flops == sparse.tokens * 6 * weights + sparse.tokens // 256 * 3 * pairs * 12 * 4 * 16
    assert sparse.flops < sparse.dense_flops


def test_conversations_that_are_cut_are_counted():
    """Catches conversations that are cut or left out without a word."""
    config = config_of()
    data = replace(config.data, sources={"a": replace(config.data.sources["a"], format="chat")})
    talks = known(np.array([100, 257, 258, 300, 400]), np.array([99, 256, 256, 0, 0]))
    text = " ".join(make_plan(replace(config, data=data), 384, sources={"a": talks}).text().split())
    assert "of 5 conversations 1 are cut to their first 256 tokens, and 2 are left out" in text
    assert "documents that reach" not in text and text.count("conversations") == 1


def test_dense_at_this_length_is_said():
    """Catches a stage of MoBA or windows that is full attention in disguise."""
    assert "warning" not in make_plan(config_of(), 384).text()
    plan = make_plan(config_of(attention={"block_size": 64, "top_k": 4}), 384)
    assert plan.stages[0].covers and "warning: MoBA is dense at this length" in plan.text()
    assert plan.stages[0].attended_share == 1.0
    for window, is_wide in ((255, False), (256, True)):
        plan = make_plan(config_of(attention={"pattern": "S", "window": window}), 384)
        assert bool(plan.stages[0].covers) == is_wide == ("warning: sliding windows hide nothing" in plan.text())
        assert (plan.stages[0].attended_share == 1.0) == is_wide


def test_text_says_what_a_stage_changes():
    """Catches RoPE, mix, learning rate or batches that a reader can't find."""
    config = config_of(rope={"scaling": "yarn", "factor": 4, "original_length": "8K", "theta": 5e5}, mix={"a": 1})
    plan = make_plan(config, 384, Hardware(world_size=2), {"a": known(np.full(8, 512))})
    text = plan.text()
    assert "theta 500000, yarn x4 from 8K" in text
    assert "cosine, peak 0.0003" in text and "2 CPU processes, ZeRO 1, fp32" in text
    assert "10 epochs of 8 documents" in text
    assert [stage.micro_batches for stage in plan.stages] == [2, 2]
    assert plan.total_steps == sum(stage.steps for stage in plan.stages) == 40
    assert json.loads(json.dumps(plan.to_dict()))["stages"][0]["steps"] == 32


def test_text_says_what_an_extension_changes():
    """Catches an extension whose rate, moments or own RoPE scaling a reader can't find, and a length that no document
    reaches without a warning."""
    own = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    own["original_max_position_embeddings"] = 64
    long = {"tokens": "8K", "seq_len": 1024, "reset_optimizer": True, "lr": {"kind": "constant", "peak": 1e-5}}
    values = to_dict(config_of())
    values["model"]["rope_scaling"] = own
    values["schedule"]["tokens"] = None
    values["schedule"]["stages"] |= {
        "long": long | {"rope": {"scaling": "linear", "factor": 4}},
        "ntk": {"tokens": "8K", "rope": {"scaling": "ntk", "factor": 4}, "long_documents": {"share": 0.6}},
    }
    config = freeze(values)
    unknown = make_plan(config, 384)
    assert {stage.long_share for stage in unknown.stages} == {None}
    assert unknown.text().count("is known once the data is tokenised") == 1

    lengths = np.array([11] * 970 + [301])  # 9700 inputs in short documents, 300 in a long one
    plan = make_plan(config, 384, sources={"a": known(lengths)})
    assert [stage.long_share for stage in plan.stages] == pytest.approx([0.03, 0.03, 0.0, 0.6])
    assert make_plan(config, 384, sources={"a": known(lengths[-10:])}).stages[0].long_share == pytest.approx(300 / 390)
    text = " ".join(plan.text().split())
    for words in (
        "theta 10000, the model's own llama3 x8, then linear x4",
        "then ntk x4 (theta 4.876e+04)",
        "1 sequence per step; learning rate set by this stage: constant, peak 1e-05, warm-up 409 tokens; fresh"
        " optimizer moments",
        "4 sequences per step; learning rate set by optim.lr; optimizer moments kept",
        "long: 0.0% of the tokens come from documents that reach 1K. Warning",
        "full: 3.0% of the tokens come from documents that reach 256. Warning",
        # 0.6 * 8192 tokens of a document of 300
        "ntk: 60.0% of the tokens come from documents that reach 256 (3.0% without long_documents); documents of a >="
        " 256 are read up to 16 times",
    ):
        assert words in text, words


def test_layers_are_named():
    """Catches an off-by-one in the ranges of layers."""
    moba, full = Moba(512, 3), Full()
    assert describe_layers((moba,) * 4 + (full,) * 2) == "moba 512x3 (layers 0-3), full (layers 4-5)"
    assert describe_layers((moba, full, moba, moba)) == "moba 512x3 (layers 0, 2-3), full (layer 1)"


def test_options_and_held_out_set_are_in_words():
    """Catches a key's name where words belong, and a run that is evaluated on books its user never asked for."""
    config = config_of()
    model = replace(config.model, qk_norm=True, qkv_bias=True)
    data = replace(config.data, validation=SourceConfig(path="embedded"))
    text = " ".join(make_plan(replace(config, model=model, data=data), 384).text().split())
    assert "SwiGLU of 96, tied embeddings, biases on q, k, v, QK-norm" in text
    assert "held out: the shipped books, up to 16 documents" in text
    assert "held out" not in make_plan(config, 384).text()


def test_kernels_are_those_that_will_run():
    """Catches a plan that promises cuDNN to short documents in long packs, to deterministic runs, old GPUs or CPUs."""

    def kernels(seq_len, hardware, **run):
        values = {
            "run": run,
            "model": {"hidden_size": 512, "num_layers": 2, "num_heads": 4, "ffn_size": 64},
            "data": {"sources": {"a": {"path": "a.txt"}}},
            "schedule": {"seq_len": seq_len, "batch_tokens": "32K", "micro_tokens": "32K", "stages": {}},
        }
        values["schedule"]["stages"]["a"] = {"tokens": "32K", "attention": {"kind": "full"}}
        return make_plan(freeze(values), 384, hardware).kernels[0]

    gpu = Hardware(num_gpus=1)
    assert kernels("4K", gpu) == "full on cudnn" and kernels("2K", gpu) == "full on flash"
    assert kernels("4K", gpu, deterministic=True).startswith("full on flash (not 'cudnn' (")
    assert kernels("4K", Hardware()) == kernels("4K", gpu, device="cpu") == "full on torch"
    assert kernels("4K", replace(gpu, has_bf16=False)).startswith("full on flash (not 'cudnn' (")


def memory_of(stage: int, world_size: int, bf16: bool = True, **engine):
    """The estimate for a 1.5B model, one 32K sequence at a time."""
    model = ModelConfig(hidden_size=2560, num_layers=20, num_heads=20, ffn_size=6784, loss_tile=2048)
    return model, estimate_memory(
        model,
        32768,
        DeepSpeedConfig(zero_stage=stage, **engine),
        bf16=bf16,
        world_size=world_size,
        micro_tokens=32768,
        attention=(Full(),) * 20,
    )


def test_memory_of_model_states():
    """Catches what ZeRO splits and what it doesn't (2 + 4 + 12 bytes per parameter in bf16, 4 + 4 + 8 in plain
    fp32), and the billion weights that ZeRO 3 keeps gathered."""
    model, one = memory_of(3, 1)
    size, gathered = num_parameters(model, 32768)["total"], 2 * 10**9
    assert size > 10**9 and (one.weights, one.optimizer) == (2 * size + gathered, 12 * size)
    for stage in (1, 2, 3):
        _, many = memory_of(stage, 8)
        shard = -(-size // 8)
        assert many.optimizer == 12 * shard
        assert many.weights == (2 * shard + gathered if stage == 3 else 2 * size)
        assert many.gradients >= 4 * (shard if stage >= 2 else size)
    assert memory_of(2, 8)[1].gradients < memory_of(1, 8)[1].gradients
    plain = memory_of(0, 8, bf16=False)[1]
    assert plain.weights + plain.gradients + plain.optimizer == 16 * size


def test_memory_offloaded_and_recomputed():
    """Catches offloaded states that still count on the device, and checkpointing that changes nothing."""
    _, here = memory_of(3, 1)
    _, there = memory_of(3, 1, offload_optimizer=True, offload_params=True)
    gathered = 2 * 10**9
    assert (there.weights, there.optimizer) == (gathered, 0)
    assert there.host == here.weights - gathered + here.optimizer * 22 // 12
    assert there.gradients == here.gradients - here.optimizer // 3 == 2 * 500_000_000, "summed on the host"
    model, _ = memory_of(1, 1)
    arguments = {"bf16": True, "world_size": 1, "micro_tokens": 32768, "attention": (Full(),) * 20}
    kept = estimate_memory(model, 32768, DeepSpeedConfig(), **arguments)
    lean = estimate_memory(replace(model, activation_checkpointing=True), 32768, DeepSpeedConfig(), **arguments)
    half = estimate_memory(replace(model, activation_checkpointing="mlp"), 32768, DeepSpeedConfig(), **arguments)
    assert lean.activations < kept.activations / 5 and lean.total < kept.total
    assert 2 * lean.activations < half.activations < kept.activations / 2


def verdict(seq_len: str, memory: int, num_gpus: int = 1, **sections) -> str:
    """What the plan says of an 8B model on GPUs of `memory` bytes."""
    model = {"hidden_size": 4096, "num_layers": 32, "num_heads": 32, "num_kv_heads": 8, "ffn_size": 14336}
    model["activation_checkpointing"] = False
    values = {
        "model": model | sections.pop("model", {}),
        "data": {"sources": {"a": {"path": "a.txt"}}},
        "schedule": {"seq_len": seq_len, "batch_tokens": "64M", "stages": {"a": {"tokens": "1M"}}},
        **sections,
    }
    return make_plan(freeze(values), 32768, Hardware(num_gpus, num_gpus, num_gpus, gpu_memory=memory)).verdict


def test_verdicts():
    """Catches a run that is declared fit, advice that is in force already, and sequences nothing can fit."""
    assert verdict("8K", 1000 * GB) == "fits 1000.0 GB per GPU"
    assert "GPU; model.activation_checkpointing=mlp would" in verdict("32K", 240 * GB)
    assert "GPU; model.activation_checkpointing=true would" in verdict("32K", 190 * GB)
    text = verdict("8K", 80 * GB, model={"activation_checkpointing": True}, deepspeed={"zero_stage": 3})
    assert text == "does not fit 80.0 GB per GPU; on 2 GPUs would"
    advice = "parallel.sequence=8 deepspeed=zero3 model.activation_checkpointing=offload on 8 GPUs would"
    assert verdict("4M", 80 * GB) == f"does not fit 80.0 GB per GPU; {advice}"
    assert verdict("64M", 80 * GB).endswith("split over as many GPUs as 4,096")
    few = {"num_heads": 4, "num_kv_heads": 1, "head_dim": 128}
    advice = "parallel.sequence=16 deepspeed=zero3 model.activation_checkpointing=offload on 16 GPUs would"
    assert verdict("8M", 80 * GB, model=few).endswith(advice), "by blocks, over more GPUs than heads"
    heads = verdict("8M", 80 * GB, model=few, parallel={"sequence_by": "heads"})
    assert heads.endswith("split over as many GPUs as there are heads")
    unknown = make_plan(config_of(), 384, Hardware(num_gpus=1)).verdict
    assert "gpu_memory=80GB" in unknown


def test_verdict_follows_its_own_advice():
    """Catches advice that does not help."""
    split = {"deepspeed": {"zero_stage": 3}, "parallel": {"sequence": 8}}
    split["model"] = {"activation_checkpointing": "offload"}
    assert verdict("4M", 80 * GB, num_gpus=8, **split) == "fits 80.0 GB per GPU"
    for memory, mode in ((240 * GB, "mlp"), (190 * GB, True)):
        assert f"model.activation_checkpointing={str(mode).lower()}" in verdict("32K", memory)
        assert verdict("32K", memory, model={"activation_checkpointing": mode}).startswith("fits")


def measured_peaks():
    """(overrides, GPUs, the host's cores, GiB of a GPU, GiB of the host) of every run of benchmarks/longest_context.py
    that is kept."""
    folder = Path(__file__).parents[2] / "benchmarks" / "results" / "longest_context"
    for path in sorted(folder.glob("*/results.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        for row in record["rows"]:
            if "failed" in row:
                continue
            # What was chosen by itself stands in the row of a run's longest length.
            chosen = next(r["automatic"] for r in record["rows"] if r["case"] == row["case"] and "automatic" in r)
            micro = f"schedule.stages.at_{row['seq_len'] // 1024}K.micro_tokens=64K"
            several = any(text.startswith(micro) for text in chosen)
            cores = record.get("cores", 16 if path.parent.name == "h100_one" else 32)  # README.md says it
            own = [*row["overrides"], *(text.split(":")[0] for text in chosen if text.startswith("model."))]
            if record["commit"] == "67d748f":  # had one name for what is two ways now
                own = [text.replace("=offload", "=offload_heads") if "checkpointing" in text else text for text in own]
            groups = 1 if "parallel.sequence=2" in own else row["num_gpus"]
            batch = 64 * 1024 if several else row["seq_len"] * groups
            sizes = [f"schedule.seq_len={row['seq_len']}", f"schedule.batch_tokens={batch}"]
            sizes += [f"schedule.micro_tokens={batch}"] if several else []
            overrides, peaks = [f"model={row['model']}", *sizes, *own], (row["peak_memory_gib"], row["host_gib"])
            yield pytest.param(
                overrides, row["num_gpus"], cores, *peaks, id=f"{path.parent.name}/{row['case']}/{row['seq_len']}"
            )


@pytest.mark.parametrize(("overrides", "num_gpus", "cores", "gpu_gib", "host_gib"), list(measured_peaks()))
def test_the_estimate_is_what_was_measured(overrides, num_gpus, cores, gpu_gib, host_gib):
    """Catches formulas that drift away from what GPUs and hosts really need: within 10 % of every peak that was
    measured."""
    hardware = Hardware(num_gpus, num_gpus, num_gpus, gpu_memory=80 * GB, cores=cores)
    config = load(["+exp=moba_32k", *overrides], hardware)
    plan = make_plan(config, embedding_rows(config.model, 32768), hardware)
    assert plan.memory.total / GB == pytest.approx(gpu_gib, rel=0.1)
    assert plan.host is not None and plan.host.running / GB == pytest.approx(host_gib, rel=0.1)


def test_time_and_memory_of_a_cpu_are_said_before_it_starts():
    """Catches a run of a month that starts without a word, a time where none is known, and FLOPs or processes that are
    not counted."""
    whole = config_of()
    flops = sum(stage.flops for stage in make_plan(whole, 384).stages)
    here = Hardware(host_memory=64 * GB, cpu_flops=flops / 7200)
    plan = make_plan(whole, 384, here)
    assert plan.time is not None and plan.time.startswith("at least 2:00:00 on this CPU")
    assert plan.time in " ".join(plan.text().split())
    assert "TFLOP/s; sparse 1:31:35, full 28:25" in plan.time, "of each stage"
    assert "+exp=moba_32k_small" in plan.time
    two = replace(here, world_size=2, local_world_size=2)
    assert make_plan(whole, 384, two).time.startswith("at least 1:00:00")
    assert make_plan(whole, 384, replace(here, cpu_flops=flops / 60)).time is None
    assert make_plan(whole, 384, Hardware()).time is None
    assert "does not fit the 1 MB" in make_plan(whole, 384, replace(here, host_memory=2**20)).verdict
    gpu = Hardware(1, gpu_name="NVIDIA H100 80GB HBM3")
    gpu = make_plan(load(["+exp=moba_32k"], gpu), 32768, gpu).time
    assert gpu is not None and gpu.startswith("about ") and "40 % of their peak" in gpu


def test_the_size_of_a_checkpoint_is_that_of_its_tensors():
    """Catches moments that are forgotten, and a share of the host's memory that does not shrink with the processes."""
    config = config_of()
    large = replace(config, model=replace(config.model, ffn_size=96000))
    total = num_parameters(large.model, 384)["total"]
    megabytes = round(total * (4 + 8) / 2**20)
    text = " ".join(make_plan(large, 384, Hardware(world_size=4)).text().split())
    assert f"{megabytes} MB each, written in the background ({megabytes / 4:.0f} MB of" in text
    at_once = replace(large, checkpoint=replace(large.checkpoint, asynchronous=False))
    assert f"{megabytes} MB each evaluation" in " ".join(make_plan(at_once, 384).text().split()).replace(" no ", " ")
