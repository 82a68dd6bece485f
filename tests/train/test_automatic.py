"""What `auto` becomes on a machine, and that the plan says so."""

from dataclasses import replace

import pytest
import torch

import train.model.decoder
from conf.hardware import Hardware
from conf.schema import OFFLOAD, OFFLOAD_HEADS, ModelConfig
from conf.validate import freeze, to_dict, trajectory_diff
from moba.documents import Documents
from train.model.decoder import Decoder
from train.plan.automatic import settle
from train.plan.plan import make_plan
from train.schedule import build_schedule

GPU = Hardware(num_gpus=1)
H100 = replace(GPU, gpu_memory=80 * 2**30)
SHAPE = {"hidden_size": 64, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2, "ffn_size": 96}


def config_of(model=None, **sections):
    return freeze(
        {
            "model": SHAPE | (model or {}),
            "data": {"sources": {"a": {"path": "a.txt"}}},
            "schedule": {"seq_len": 256, "batch_tokens": "1K", "stages": {"a": {"tokens": "32K"}}},
            **sections,
        }
    )


def text_of(config, hardware):
    return " ".join(make_plan(config, 384, hardware).text().split())


@pytest.mark.parametrize(
    ("sections", "hardware", "compiled", "words"),
    [
        ({}, GPU, True, "first steps"),
        ({}, Hardware(), False, "CPU"),
        ({"run": {"device": "cpu"}}, GPU, False, "CPU"),
        ({"deepspeed": {"zero_stage": 3}}, GPU, False, "ZeRO 3"),
        ({"run": {"deterministic": True}}, GPU, False, "run.deterministic=true"),
        ({}, replace(GPU, has_triton=False), False, "triton"),
    ],
)
def test_compile(sections, hardware, compiled, words):
    """Catches a default that needs a compiler on a CPU, one that was never measured or that a plan does not mention,
    and a choice that another machine could not resume."""
    config = config_of(**sections)
    settled = settle(config, 384, hardware).config
    assert settled.model.compile is compiled
    reason = f"model.compile={str(compiled).lower()}: "
    assert reason in text_of(config, hardware) and words in text_of(config, hardware).partition(reason)[2]
    assert ("torch.compile" in text_of(config, hardware).partition(reason)[0]) == compiled
    assert trajectory_diff(config, settled) == trajectory_diff(settled, config) == []
    freeze(to_dict(settled), hardware)
    assert settle(settled, 384, hardware) == (settled, ())


def big(seq_len="32K", **model):
    """A model of 545M parameters at ZeRO 1."""
    shape = {"hidden_size": 1536, "num_layers": 16, "num_heads": 12, "ffn_size": 4096}
    schedule = {"seq_len": seq_len, "batch_tokens": seq_len, "stages": {"a": {"tokens": "1M"}}}
    return config_of(shape | {"num_kv_heads": None} | model, schedule=schedule)


def needed(mode):
    """Bytes of a GPU that the plan finds just large enough for this way."""
    return -(-make_plan(big(activation_checkpointing=mode), 384, GPU).memory.total * 100 // 92)


def test_activation_checkpointing_is_the_cheapest_that_fits():
    """Catches recomputation where memory is plenty, too little of it, a choice that the verdict contradicts, and one
    that the plan does not mention with its cost."""
    keeps, half, lean, host, least = (needed(mode) for mode in (False, "mlp", True, OFFLOAD, OFFLOAD_HEADS))
    assert least < host < lean < half < keeps
    cases = [
        (2 * keeps, False, "nothing is recomputed"),
        (keeps + 100, False, "nothing is recomputed"),
        (keeps - 100, "mlp", "two of a layer's seven matrix products"),
        (half + 100, "mlp", "two of a layer's seven matrix products"),
        (half - 100, True, "every layer's forward pass, about a third"),
        (lean - 100, OFFLOAD, "copies layers' inputs to the host and back"),
        (host - 100, OFFLOAD_HEADS, "attention's twice"),
        (least - 100, OFFLOAD_HEADS, "attention's twice"),
    ]
    for memory, mode, words in cases:
        hardware = replace(GPU, gpu_memory=memory)
        settled = settle(big(), 384, hardware).config
        assert settled.model.activation_checkpointing == mode
        assert type(settled.model.activation_checkpointing) is type(mode)
        text = text_of(big(), hardware)
        assert f"model.activation_checkpointing={str(mode).lower()}: " in text and words in text
        verdict = make_plan(big(), 384, hardware).verdict
        assert verdict.startswith("fits") if memory > least else "deepspeed=zero3" in verdict or "GPUs would" in verdict
        assert trajectory_diff(big(), settled) == []


def test_activation_checkpointing_sees_the_longest_stage_and_all_processes():
    """Catches a choice for the first stage alone, and one that forgets that ZeRO shares the optimizer's state."""
    hardware = replace(GPU, gpu_memory=needed("mlp") + 100)
    stages = {"a": {"tokens": "1M", "seq_len": "2K"}, "b": {"tokens": "1M"}}
    schedule = {"seq_len": "32K", "batch_tokens": "32K", "stages": stages}
    config = replace(big(), schedule=config_of(schedule=schedule).schedule)
    assert settle(config, 384, hardware).config.model.activation_checkpointing == "mlp"
    assert settle(big("2K"), 384, hardware).config.model.activation_checkpointing is False
    tight = replace(GPU, gpu_memory=needed(False) - 100)
    assert settle(big(), 384, replace(tight, world_size=8)).config.model.activation_checkpointing is False


@pytest.mark.parametrize("hardware", [Hardware(), replace(GPU, gpu_memory=None)], ids=["cpu", "unknown"])
def test_nothing_is_recomputed_where_it_is_not_known_to_help(hardware):
    """Catches a CPU run that computes twice, and a plan without the GPU's size that fails."""
    assert settle(big(), 384, hardware).config.model.activation_checkpointing is False
    assert "model.activation_checkpointing=false: " in text_of(big(), hardware)


@pytest.mark.parametrize("key", ["compile", "activation_checkpointing"])
@pytest.mark.parametrize("value", [True, False])
def test_what_the_user_names_stays(key, value):
    """Catches an automatic choice over the user's, and a plan that calls it automatic."""
    config = config_of({key: value})
    for hardware in (replace(GPU, gpu_memory=1 << 20), Hardware()):
        assert getattr(settle(config, 384, hardware).config.model, key) is value
        assert f"model.{key}={str(value).lower()}: " not in text_of(config, hardware)


def test_a_model_without_a_plan_is_eager(monkeypatch):
    """Catches `auto` taken for true where nobody chose: evaluations and exports on machines without a compiler."""
    monkeypatch.setattr(train.model.decoder, "_compiled", None)
    model = Decoder(ModelConfig(**SHAPE, loss_tile=8), 64)
    tokens = torch.arange(8)
    assert model(tokens, tokens, Documents.from_lengths([8]), tokens).shape == (8,)


def short(**changes):
    """A stage of 8K sequences and one of 32K, 128K tokens per step."""
    schedule = {"batch_tokens": "128K", "stages": {"a": {"tokens": "1M", "seq_len": "8K"}, "b": {"tokens": "1M"}}}
    return config_of(schedule=schedule | {"seq_len": "32K"} | changes.pop("schedule", {}), **changes)


def sizes(config, hardware):
    return [stage.micro_tokens for stage in build_schedule(settle(config, 384, hardware).config).stages]


def test_short_sequences_share_a_micro_batch_on_a_gpu():
    """Catches a H100 that waits for its host between short sequences, a size that the batch does not divide into, one
    for all stages, one that a plan does not mention, one that another machine could not resume, and a choice instead
    of the user's."""
    k = 1024
    assert sizes(short(), GPU) == [8 * k, 32 * k], "its memory is not known"
    assert sizes(short(), H100) == [32 * k, 32 * k]
    assert sizes(short(), Hardware()) == sizes(short(run={"device": "cpu"}), H100) == [8 * k, 32 * k]
    assert sizes(short(schedule={"batch_tokens": "96K"}), replace(H100, world_size=3)) == [32 * k, 32 * k]
    odd = {"batch_tokens": "40K", "stages": {"a": {"tokens": "1M"}}, "seq_len": "8K"}
    assert sizes(short(schedule=odd), H100) == [8 * k], "five sequences divide by one or five"
    assert sizes(short(schedule={"micro_tokens": "64K"}), H100) == [64 * k, 64 * k]
    config = short()
    settled = settle(config, 384, H100).config
    assert "schedule.stages.a.micro_tokens=32K: 4 sequences at a time" in text_of(config, H100)
    assert trajectory_diff(config, settled) == trajectory_diff(settled, config) == []
    assert settle(settled, 384, H100) == (settled, ())
    freeze(to_dict(settled), H100)


def test_a_micro_batch_is_no_larger_than_the_memory():
    """Catches several sequences at a time that cost recomputation, or more memory than there is."""
    shape = {"hidden_size": 1536, "num_layers": 16, "num_heads": 12, "num_kv_heads": None, "ffn_size": 4096}
    schedule = {"seq_len": "8K", "batch_tokens": "64K", "stages": {"a": {"tokens": "1M"}}}
    config = config_of(shape, schedule=schedule)
    one = replace(config, schedule=replace(config.schedule, stages=micro(config, 8 * 1024)))
    four = replace(config, schedule=replace(config.schedule, stages=micro(config, 32 * 1024)))
    least, most = (make_plan(c, 384, GPU).memory.total * 100 // 92 for c in (one, four))
    found = []
    for memory in range(least + 2**20, most + 2**30, (most - least) // 7):
        hardware = replace(GPU, gpu_memory=memory)
        settled = settle(config, 384, hardware).config
        assert settled.model.activation_checkpointing is False
        assert make_plan(settled, 384, hardware).memory.total <= 0.92 * memory
        found.append(settled.schedule.stages["a"].micro_tokens or 8 * 1024)
    assert found == sorted(found) and set(found) == {8 * 1024, 16 * 1024, 32 * 1024}


def micro(config, tokens):
    return {name: replace(stage, micro_tokens=tokens) for name, stage in config.schedule.stages.items()}
