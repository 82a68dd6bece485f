"""Training with one sequence over several processes gives the losses and gradients of one process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sequence_worker import ARRANGEMENTS, LENGTH, PACKS, STEPS, build_model, pack

from data.packing import IGNORED
from train.record.position_loss import PositionLoss

ROOT = Path(__file__).resolve().parents[2]


def reference() -> dict:
    """The same in a plain torch loop, without engine or processes."""
    model = build_model()
    matrices, others = ([p for p in model.parameters() if (p.ndim >= 2) == is_matrix] for is_matrix in (True, False))
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95))
    by_position, records = PositionLoss(LENGTH, "cpu"), []
    for step in range(STEPS):
        packs = [pack(step, i) for i in range(PACKS)]
        losses = [model(b.tokens, b.positions, b.documents, b.labels) for b in packs]
        loss = torch.cat(losses).sum() / sum(int((b.labels != IGNORED).sum()) for b in packs)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.3)
        optimizer.step()
        optimizer.zero_grad()
        for one, batch in zip(losses, packs):
            by_position.add(one.detach(), batch.positions, batch.labels, batch.cu_seqlens)
        records.append({"loss": loss.item(), "grad_norm": float(norm)})
    curve = by_position.curve()
    return {"steps": records, "curve": curve.mean.tolist(), "se": curve.se.tolist()}


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict:
    report = tmp_path_factory.mktemp("sequence") / "report.json"
    clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=4"]
    worker = Path(__file__).with_name("sequence_worker.py")
    done = subprocess.run(
        [*torchrun, str(worker), str(report)],
        env=clean | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert report.exists(), f"{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return json.loads(report.read_text())


@pytest.mark.parametrize("engine", ["zero0", "zero1", "zero2", "zero3", "zero1 offload", "zero3 offload_heads"])
@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
def test_processes_train_as_one(found, arrangement, engine):
    """Catches tokens counted once per process, gradients of slices that are not added up or added twice, documents
    whose parts count as clusters of their own: losses, gradient norms and the curve by position with its errors. With
    layers' inputs on the host too."""
    expected, got = reference(), found[arrangement][engine]
    for ours, theirs in zip(got["steps"], expected["steps"], strict=True):
        assert ours == pytest.approx(theirs, rel=2e-6)
    assert got["curve"] == pytest.approx(expected["curve"], rel=2e-6, nan_ok=True)
    if arrangement != "4x1":  # there each document is counted twice
        assert got["se"] == pytest.approx(expected["se"], rel=2e-5, nan_ok=True)
