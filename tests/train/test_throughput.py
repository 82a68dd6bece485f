"""Throughput: the rates count what the written convention says, and the clock runs only while training."""

from types import SimpleNamespace

import pytest

from conf.schema import ModelConfig
from moba.kinds import Full, Moba
from train.record.throughput import CONVENTION, Throughput, Work, batch_work, peak_tflops

FULL = Full()
MOBA = Moba(block_size=4, top_k=2)
MODEL = ModelConfig(hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, ffn_size=48)


def stage(name="sparse", index=0, start=0, end=1000, seq_len=64, attention=(MOBA, MOBA)):
    return SimpleNamespace(
        name=name, index=index, start=start, end=end, seq_len=seq_len, batch_tokens=128, attention=attention
    )


def pairs_by_hand(spec, lengths):
    """Counts a query at a time, from the definition: its own block causally, and top_k - 1 complete earlier blocks."""
    total = 0
    for length in lengths:
        for query in range(length):
            if spec == FULL:
                total += query + 1
            else:
                own = query // spec.block_size
                total += query % spec.block_size + 1 + min(own, spec.top_k - 1) * spec.block_size
    return total


def test_work_of_a_batch_equals_pairs_counted_one_by_one():
    """Catches layers forgotten in the sum, documents merged, and a cache that confuses plans or lengths."""
    lengths = (1, 3, 4, 9, 30)
    for plan in ((MOBA, MOBA), (MOBA, FULL), (FULL, FULL)):
        work = batch_work(plan, lengths)
        assert work.tokens == sum(lengths)
        assert work.attended_pairs == sum(pairs_by_hand(spec, lengths) for spec in plan)
        assert work.causal_pairs == 2 * pairs_by_hand(FULL, lengths)
    assert batch_work((MOBA, MOBA), lengths).attended_pairs < batch_work((MOBA, FULL), lengths).attended_pairs


def test_rates_follow_the_written_convention():
    """Catches a wrong factor anywhere in TFLOP/s, MFU or their dense equivalents, against the formula written out."""
    meter = Throughput(MODEL, 256, num_devices=2, device_name="NVIDIA H100 80GB HBM3")
    meter.add((MOBA, FULL), [10, 22])
    work = meter.take()
    rates = meter.rates(Work(*(2 * count for count in work)), seconds=0.5)  # two ranks with the same work
    tokens = 64
    weights = 2 * (32 * 64 * 2 + 32 * 32 * 2 + 3 * 32 * 48) + 32 * 256  # q and o, k and v, SwiGLU; output projection
    attended = 2 * (pairs_by_hand(MOBA, [10, 22]) + pairs_by_hand(FULL, [10, 22]))
    causal = 4 * pairs_by_hand(FULL, [10, 22])
    flops = 6 * weights * tokens + 3 * 4 * 4 * 16 * attended
    dense_flops = 6 * weights * tokens + 3 * 4 * 4 * 16 * causal
    assert attended < causal
    assert rates["tokens_per_second"] == tokens / 0.5
    assert rates["tflops"] == pytest.approx(flops / 0.5 / 2 / 1e12, rel=1e-12)
    assert rates["mfu"] == pytest.approx(flops / 0.5 / 2 / 989.4e12, rel=1e-12)
    assert rates["mfu_dense_equivalent"] == pytest.approx(dense_flops / 0.5 / 2 / 989.4e12, rel=1e-12)
    assert rates["attended_share"] == attended / causal


def test_mfu_is_null_where_the_peak_is_unknown():
    """Catches an MFU invented for a CPU or an unlisted device."""
    for name in (None, "Some Future Device"):
        meter = Throughput(MODEL, 256, device_name=name)
        meter.add((MOBA, MOBA), [16])
        work = meter.take()
        rates = meter.rates(work, 1.0)
        assert rates["mfu"] is None and rates["mfu_dense_equivalent"] is None and rates["tflops"] > 0
        assert meter.describe() == {
            "device": name or "cpu",
            "num_devices": 1,
            "peak_tflops": None,
            "convention": CONVENTION,
        }


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.4),
        ("NVIDIA H20", 148.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A100-PCIE-40GB", 312.0),
        ("NVIDIA A10", 125.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA L40", 181.0),
        ("NVIDIA B200", 2250.0),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA RTX A4000", None),
        ("NVIDIA A10G", None),
        ("cpu", None),
        (None, None),
    ],
)
def test_peak_by_device_name(name, peak):
    """Catches names that contain one another (H20 in H200, A10 in A100, L4 in L40S)."""
    assert peak_tflops(name) == peak


def test_paused_time_is_not_training_time(monkeypatch):
    """Catches an evaluation that is charged to training speed, also when it ends in an error."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr("train.record.metrics.time.perf_counter", lambda: clock.now)
    meter = Throughput(MODEL, 256)
    clock.now += 2.0
    with pytest.raises(KeyError), meter.paused():
        clock.now += 50.0
        raise KeyError
    clock.now += 1.0
    assert meter.lap() == 3.0
    clock.now += 4.0
    assert meter.lap() == 4.0


def test_eta_charges_a_later_stage_by_its_flops():
    """Catches an ETA that ignores that full attention at full length is slower than the sparse stage before it."""
    meter = Throughput(MODEL, 256)
    long = [
        stage(end=900, seq_len=4096),
        stage("full", 1, start=900, end=1000, seq_len=4096, attention=(FULL, FULL)),
    ]

    def cost(spec):
        flops = 6 * (2 * (32 * 64 * 2 + 32 * 32 * 2 + 3 * 32 * 48) + 32 * 256) * 4096
        return flops + 3 * 4 * 4 * 16 * 2 * pairs_by_hand(spec, [4096])

    ratio = cost(FULL) / cost(MOBA)
    assert ratio > 2
    assert meter.eta_seconds(long, 400, 10.0) == pytest.approx((500 + 100 * ratio) / 10.0)
    assert meter.eta_seconds(long, 950, 10.0) == pytest.approx(5.0)
    assert meter.eta_seconds(long, 1000, 10.0) == 0.0
