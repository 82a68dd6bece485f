"""What processes that share a sequence exchange: chosen for a stated reason, refused by name where it cannot be."""

import pytest
from test_validate import STAGES, changed, problems_of

from conf.exchange import BLOCKS, HEADS, exchange
from conf.hardware import Hardware
from conf.validate import freeze
from train.plan.describe import describe_engine, describe_kernels
from train.plan.memory import gathered_bytes
from train.schedule import build_schedule


def shared(size: int, *more: tuple[str, object], heads: tuple[int, int] = (4, 2)) -> dict:
    sizes = (("model.num_heads", heads[0]), ("model.num_kv_heads", heads[1]), ("model.head_dim", 8))
    return changed(("parallel.sequence", size), *sizes, *more)


@pytest.mark.parametrize(
    ("size", "heads", "by"),
    [
        (2, (4, 2), HEADS),
        (4, (4, 4), HEADS),
        (8, (4, 4), BLOCKS),  # fewer heads than processes
        (4, (14, 14), HEADS),  # does not divide, repeats nothing
        (2, (8, 1), BLOCKS),  # one key/value head, which both would get
        (4, (32, 8), HEADS),
        (16, (32, 8), HEADS),  # repeated, but still less than all keys and values to 16
        (4, (32, 2), BLOCKS),
    ],
)
def test_auto_chooses_what_sends_less_where_heads_would_be_repeated(size, heads, by):
    """Catches blocks, which need more memory, where nothing is gained, and heads where there are too few."""
    config = freeze(shared(size, heads=heads))
    assert exchange(config).by == by
    text = describe_engine(config, Hardware(num_gpus=0, world_size=size))
    assert f"by {by} ({exchange(config).reason})" in text


def test_what_is_set_is_taken():
    """Catches a choice that overrules the user's."""
    assert exchange(freeze(shared(2, ("parallel.sequence_by", "blocks")))).by == BLOCKS
    assert exchange(freeze(shared(2, ("parallel.sequence_by", "heads"), heads=(8, 1)))).by == HEADS


def test_what_slices_cannot_do_is_refused_by_name():
    """Catches settings that would fail, or compute something else, once memory is allocated."""
    blocks = ("parallel.sequence_by", "blocks")
    (line,) = problems_of(shared(2, ("parallel.sequence_by", "rings")))
    assert line.startswith("parallel.sequence_by=rings") and "auto, heads" in line
    (line,) = problems_of(shared(8, ("parallel.sequence_by", "heads")))
    assert line.startswith("parallel.sequence=8: at most model.num_heads=4") and "sequence_by=blocks" in line
    backend = f"{STAGES}.full.attention.backend"
    full = (f"{STAGES}.full.attention.kind", "full"), (backend, "cudnn")
    (line,) = problems_of(shared(2, blocks, *full))
    assert line.startswith(f"{backend}=cudnn: cannot attend from slices") and "auto or flash" in line
    gate = f"{STAGES}.sparse.attention.gate"
    (line,) = problems_of(shared(2, blocks, (gate, "random")))
    assert line.startswith(f"{gate}=random: cannot draw alike") and "sequence_by=heads" in line
    # Where only blocks are left, auto does not take them in silence.
    (line,) = problems_of(shared(8, (gate, "random")))
    assert line.startswith(f"{gate}=random")
    assert exchange(freeze(shared(2, (gate, "random"), heads=(8, 1)))).by == HEADS
    heads = ("parallel.sequence_by", "heads")
    (line,) = problems_of(shared(4, heads, (gate, "shared")))  # 4 heads, of which two share keys
    assert line.startswith(f"{gate}=shared: needs the heads that share keys in one process") and "=2, or" in line
    freeze(shared(2, heads, (gate, "shared")))
    freeze(shared(4, blocks, (gate, "shared")))


def test_a_slice_holds_what_a_key_convolution_reads():
    """Catches half slices, front and back, that are checked as whole ones."""
    short = [("model.key_conv", 5), ("schedule.seq_len", 12), ("schedule.batch_tokens", 12)]
    short += [(f"{STAGES}.sparse.attention.block_size", 4)]
    freeze(shared(2, *short, ("parallel.sequence_by", "heads")))
    assert any("each process needs at least 8 tokens" in line for line in problems_of(
        shared(2, *short, ("parallel.sequence_by", "blocks"))
    ))  # fmt: skip


def test_the_plan_names_the_kernels_of_slices():
    """Catches a plan that promises cuDNN, which attends from whole documents only."""
    gpu = Hardware(num_gpus=2, world_size=2, local_world_size=2)
    for by, kernels in ((HEADS, "full on cudnn"), (BLOCKS, "full on flash (not 'cudnn' (processes have slices")):
        lengths = ("schedule.seq_len", "16K"), ("schedule.batch_tokens", "32K")
        config = freeze(shared(2, ("parallel.sequence_by", by), *lengths, (f"{STAGES}.full.attention.kind", "full")))
        found = describe_kernels(config, build_schedule(config).stages, gpu, bf16=True)
        assert any(text.startswith(kernels) for text in found), found


def test_gathered_keys_and_values_are_counted():
    """By hand: 1,000 tokens, of which the process has 500, 2 heads of 8, keys and values, bf16, 4 layers."""
    one = 1000 * 2 * 2 * 8 * 2
    kept = ((False, (4 * one // 2, 3 * one)), (True, (0, 4 * one)), ("offload_heads", (0, 4 * one // 2)))
    for mode, expected in kept:
        model = freeze(shared(2, ("model.activation_checkpointing", mode))).model
        assert gathered_bytes(model, 1000, 500, bf16=True) == expected
