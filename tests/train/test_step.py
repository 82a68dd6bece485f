"""One optimizer step on every ZeRO stage: against plain torch, on one rank and two, and when numbers go wrong."""

import pytest
from engine_runs import COMPILED, ENGINES, GRAD_CLIP, LAST, ON_DEVICE, SWITCH_AT, bad_kinds, num_packs, reference

FP32 = [name for name in ENGINES if "bf16" not in name]
WORLDS = (1, 2)


def column(steps, key):
    return [step[key] for step in steps]


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("name", ENGINES)
def test_steps_equal_a_plain_torch_loop(first_runs, name, world_size):
    """Catches a loss averaged per rank or micro-batch, a wrong gradient scale, clipping, weight decay or learning
    rate, and an engine that keeps its first number of micro-batches."""
    assert num_packs(SWITCH_AT - 1) != num_packs(SWITCH_AT)
    steps, expected = first_runs[world_size][name]["steps"], reference()[: LAST + 1]
    assert any(norm > GRAD_CLIP for norm in column(expected, "grad_norm")), "clipping must act"
    assert len(set(column(expected, "num_tokens"))) > 3, "steps must differ in valid tokens"
    relative = 2e-2 if "bf16" in name else 1e-5
    assert column(steps, "num_tokens") == column(expected, "num_tokens")
    assert column(steps, "loss") == pytest.approx(column(expected, "loss"), rel=relative)
    assert column(steps, "grad_norm") == pytest.approx(column(expected, "grad_norm"), rel=relative)


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("name", ENGINES)
def test_a_reset_optimizer_is_a_new_one(first_runs, name, world_size):
    """Catches moments or a step count that survive a reset in some engine, and a reset that touches the weights."""
    found = first_runs[world_size][name]["reset"]
    assert found["step_count"] == 0 and found["moments_are_zero"] and found["weights_kept"]
    expected, kept = (column(reference(reset)[LAST + 1 :], "loss") for reset in (True, False))
    relative = 2e-2 if "bf16" in name else 1e-5
    assert column(found["steps"], "loss") == pytest.approx(expected, rel=relative)
    assert kept[0] == expected[0] and kept[1] != pytest.approx(expected[1], rel=1e-3), "it must matter"


@pytest.mark.parametrize("name", FP32)
def test_two_ranks_train_as_one(first_runs, name):
    """Catches anything that depends on how tokens fall on ranks."""
    one, two = (column(first_runs[world_size][name]["steps"], "loss") for world_size in WORLDS)
    assert one == pytest.approx(two, rel=1e-5)


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name in ENGINES for kind in bad_kinds(name)])
def test_a_bad_step_is_skipped_by_all_ranks_and_leaves_no_trace(first_runs, name, world_size, kind):
    """Catches a rank that steps alone, weights or moments touched by a bad step, and bad losses in the position sums.
    The inf has finite gradients, so only the test of the loss can see it. Spikes are known by the loss or by the norm
    alone."""
    bad = first_runs[world_size][name]["bad"][kind]
    assert bad["skipped"] == [True] * world_size
    assert bad["untouched"]
    assert bad["observed"] == 0
    assert bad["spike"] == [kind.startswith("spike")] * world_size
    assert bad["loss_is_finite"] == (kind not in ("nan", "inf"))


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("name", ENGINES)
def test_after_bad_steps_training_goes_on_as_if_there_had_been_none(first_runs, second_runs, name, world_size):
    """Catches gradients that survive a skipped step: the last step after three bad ones against that of a good run."""
    assert first_runs[world_size][name]["steps"][LAST] == second_runs[world_size][name]["same"]["steps"][-1]


@pytest.mark.parametrize("world_size", WORLDS)
def test_all_ranks_stop_if_one_wants_to(first_runs, world_size):
    """Catches ranks that disagree about the last step, which is a deadlock."""
    assert all(first_runs[world_size][name]["stop"] == [True] * world_size for name in ENGINES)


@pytest.mark.parametrize("world_size", WORLDS)
def test_observers_get_the_losses_of_the_step(first_runs, world_size):
    """Catches a position loss that sees other numbers than the optimizer, or only some micro-batches."""
    for name in ENGINES:
        run = first_runs[world_size][name]
        last = run["steps"][LAST]
        assert run["observed_sum"] / last["num_tokens"] == pytest.approx(last["loss"], rel=1e-9)


@pytest.mark.parametrize("world_size", WORLDS)
def test_nothing_gathers_weights_inside_what_is_compiled(first_runs, world_size):
    """Catches hooks of ZeRO 3 that break the graph of a layer's parts, or have them compiled again at other steps: one
    graph before attention, one after it."""
    found = first_runs[world_size][COMPILED]
    assert (found["graphs"], found["breaks"]) == (2, 0)


def test_the_engines_are_the_ones_meant(first_runs):
    """Catches a table that tests the same optimizer under many names."""
    kinds = {name: first_runs[2][name]["optimizer"] for name in ENGINES}
    assert kinds["z0"] == "VetoedAdamW"
    assert kinds[ON_DEVICE] == kinds["z1-bf16-spikes"] == "DeviceOptimizer"
    assert kinds["z2-bf16"] == "DeepSpeedZeroOptimizer"
    assert kinds["z3"] == "DeepSpeedZeroOptimizer_Stage3"
