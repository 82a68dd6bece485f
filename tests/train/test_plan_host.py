"""Main memory in the plan against sums done by hand, and what follows from it."""

from dataclasses import replace

import pytest

from conf.hardware import Hardware
from launch.config import load
from train.model.sizes import num_parameters
from train.plan.automatic import settle
from train.plan.plan import make_plan

GB = 2**30
ROWS = 32768


def plan_of(*overrides, num_gpus=1, host=None, cores=16):
    hardware = Hardware(num_gpus, num_gpus, num_gpus, gpu_memory=80 * GB, host_memory=host, cores=cores)
    config = load(["+exp=moba_32k", "model=paper_1_1b", *overrides], hardware)
    return config, make_plan(config, ROWS, hardware), hardware


def long(seq_len, sequence=1, batch=1):
    return [f"schedule.seq_len={seq_len}", f"schedule.batch_tokens={batch * seq_len}", f"parallel.sequence={sequence}"]


@pytest.mark.parametrize("sequence", [1, 2])
def test_what_is_put_on_the_host_is_counted_for_all_of_its_processes(sequence):
    """Catches inputs of layers that a shared sequence counts twice, an optimizer that each process counts whole, and
    compiler workers of one process."""
    tokens = 512 * 1024
    config, plan, _ = plan_of(
        *long(tokens, sequence, 2 // sequence),
        "model.activation_checkpointing=offload",
        "deepspeed=zero1_offload",
        num_gpus=2,
    )
    model, parameters = config.model, num_parameters(config.model, ROWS)["total"]
    sequences = 2 // sequence
    inputs = sequences * tokens * model.num_layers * model.hidden_size * 2
    assert plan.host.offloaded == pytest.approx(inputs + 22 * parameters, abs=100)
    assert plan.host.own == 2 * (3 + 16 * 0.375) * GB
    assert plan.host.saving == pytest.approx(12 * parameters, abs=100)
    text = " ".join(plan.text().split())
    assert f"a host: {plan.host.total / GB:.1f} GB of main memory: offloaded" in text
    kept = 8 * 1024 * 32768  # of the activations that stay
    assert plan_of("deepspeed=zero3")[1].host.own == 3 * GB + kept, "is not compiled"
    assert plan_of("checkpoint.asynchronous=false")[1].host.saving == 0
    assert plan_of(cores=None)[1].host.own == plan_of(cores=192)[1].host.own == 15 * GB + kept


def test_weights_are_drawn_on_the_host_before_they_go_to_the_gpus():
    """Catches a start of a large model that needs more than the run after it, and one that ZeRO 3 does not need."""
    _, plan, _ = plan_of("model=llama3_8b", "deepspeed=zero2", num_gpus=8)
    parameters = plan.parameters["total"]
    assert plan.host.running == 8 * (3 * GB + 4 * parameters)
    _, sharded, _ = plan_of("model=llama3_8b", "deepspeed=zero3", num_gpus=8)
    recomputed = 14 * 1024 * 32768
    assert sharded.host.running == 8 * (3 * GB + recomputed)
    _, offloaded, _ = plan_of("model=llama3_8b", "deepspeed=zero2_offload", num_gpus=1)
    assert offloaded.host.running == pytest.approx(22 * parameters + 9 * GB + recomputed, abs=100), (
        "more than while it starts"
    )


def test_auto_offloads_only_what_the_host_has_room_for():
    """Catches a run that its host kills, and offloading that is given up although there is room."""
    needed = plan_of(*long(2**20))[1].host.total
    room = needed * 100 // 92
    for host, mode in ((None, "offload_heads"), (room + 100, "offload_heads"), (room - GB, True)):
        config, plan, hardware = plan_of(*long(2**20), host=host)
        assert settle(config, ROWS, hardware).config.model.activation_checkpointing == mode
        text = " ".join(plan.text().split())
        assert ("not offloaded: that needs" in text) == (mode is True)
        assert plan.verdict.startswith("does not fit" if mode is True else "fits")


def test_a_host_that_is_too_small_is_named():
    """Catches a verdict that sees the GPUs alone, and advice that does not help."""
    own = [*long(2**20), "model.activation_checkpointing=offload_heads"]
    host = plan_of(*own)[1].host
    assert plan_of(*own, host=host.total * 100 // 92 + 100)[1].verdict == "fits 80.0 GB per GPU"
    verdict = plan_of(*own, host=host.total)[1].verdict
    assert verdict.startswith(f"fits 80.0 GB per GPU, but {host.total / GB:.1f} GB do not fit the")
    assert verdict.endswith("of the host's memory; checkpoint.asynchronous=false would")
    assert plan_of(*own, "checkpoint.asynchronous=false", host=host.total)[1].verdict == "fits 80.0 GB per GPU"
    assert plan_of(*own, host=host.running)[1].verdict.endswith("of the host's memory")


def test_a_run_on_a_cpu_has_no_host_beside_it():
    """Catches memory that is counted twice."""
    config, _, hardware = plan_of()
    plan = make_plan(config, ROWS, replace(hardware, num_gpus=0))
    assert plan.host is None and "a host:" not in plan.text()
