"""What sparse attention costs in each layer of a model, and the plan that costs least under a budget of pairs.

On a quarter of the documents (by clusters): how far each candidate's output is from full attention's, layer
by layer, in one pass of the dense model; and what the loss says with one layer sparse at a time, as the candidate that
comes closest within the budget. Both together predict every candidate's cost in every layer (evals/plan_search.py). The
best plan layer by layer, and the best with all layers alike, are then measured whole, and the better one is taken. What
it costs is measured on the other documents.

Two costs: `regret`, the loss minus full attention's on the same tokens, and `kl`, the divergence of the predictions
from full attention's, which is the regret that text drawn from the dense model would have. Single layers move the loss
by less than its noise; the divergence has no sampling of the next token in it, so it decides.

Shapes: N documents, L layers, C candidates (the last is full attention), R rows, V vocabulary, H heads, D head size.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from conf.numbers import format_length
from data.packing import IGNORED, Batch
from evals.ledger import Countdown, Ledger
from evals.plan_search import allocate, best_alike, pairs_share, predicted_cost
from evals.position_loss import document_key
from evals.protocol import Job
from evals.statistics import clustered_mean, half_width
from evals.swap import under
from evals.tuning_report import TRAILING, Paired, Plan, Tuning
from moba.documents import Documents
from moba.gates import select
from moba.kinds import AttentionSpec, Full, Moba
from moba.kinds.plan_file import entries_of
from moba.layer import MoBAAttention
from moba.stats import MASS_ELEMENTS
from train.model.decoder import Decoder

CHOOSERS = 4
"""One cluster of documents in so many chooses: it is measured half as often as there are layers, the others thrice."""
MOST_ROWS = 512
"""Tokens per document whose predictions are compared, and queries whose attention is: the last piece, thinned out."""
ALIKE, PER_LAYER = "all layers alike", "per layer"


class Piece(NamedTuple):
    """A held-out document."""

    key: str
    cluster: str
    batch: Batch
    rows_R: Tensor
    """int64: the tokens whose predictions are compared."""


def split(job: Job) -> tuple[list[Piece], list[Piece]]:
    """The job's held-out documents: those of every CHOOSERS-th cluster, and the others. ValueError if there are not two
    clusters."""
    pieces: list[Piece] = []
    for name, batch in job.held_out():
        length = batch.tokens.numel()
        rows_R = torch.arange(length - max(1, length // TRAILING), length)
        rows_R = rows_R[batch.labels[rows_R] != IGNORED]
        if len(rows_R):  # a conversation may have no answer there
            rows_R = rows_R[torch.linspace(0, len(rows_R) - 1, min(len(rows_R), MOST_ROWS)).round().long()]
            pieces.append(Piece(document_key(batch), job.context.cluster_of(name), batch, rows_R))
    place = {cluster: i for i, cluster in enumerate(dict.fromkeys(piece.cluster for piece in pieces))}
    if len(place) < 2:
        raise ValueError(
            f"documents: {len(pieces)} of {format_length(job.seq_len)} tokens, {len(place)} cluster(s); a plan is "
            "chosen on some and measured on others: name more by data=, or set documents= higher or seq_len= lower"
        )
    chooses = {cluster: i % CHOOSERS == 0 for cluster, i in place.items()}
    return [p for p in pieces if chooses[p.cluster]], [p for p in pieces if not chooses[p.cluster]]


def tune(job: Job, candidates: Sequence[Moba], budget: float) -> Tuning:
    """The Tuning of a model for a share of the causal pairs. ValueError where the documents are too few, the model's
    attention is not all full or in full's place, or the budget too small."""
    model, length = job.context.model, job.seq_len
    dense = tuple(spec.dense() for spec in model.attention)
    entries_of(dense)  # says which attention no plan file can hold
    specs: list[AttentionSpec] = [*candidates, Full()]
    pairs_C = np.array([pairs_share(spec, length) for spec in specs])
    total, num_layers = budget * len(dense), len(dense)
    within_C = pairs_C <= budget
    if not within_C.any():
        hint = f"a layer attends to {pairs_C.min():.3f} of the pairs at least; give a larger budget, or block_sizes="
        raise ValueError(f"budget={budget:g}: {hint}")
    choosing, others = split(job)
    with under(model, dense):  # the ledger's files go by the attention in force, which is not what is measured here
        meter = _Meter(job, dense, length)
        meter.expect(len(choosing), len(others))
        errors, captured = zip(*(meter.errors(piece, candidates) for piece in choosing))
        error_LC, captured_LC = (np.mean(values, axis=0) for values in (errors, captured))
        error_LC = np.pad(error_LC, ((0, 0), (0, 1)))
        captured_LC = np.pad(captured_LC, ((0, 0), (0, 1)), constant_values=1)
        reference_L = np.where(within_C, error_LC, np.inf).argmin(1).tolist()
        alone = [(*dense[:i], specs[c], *dense[i + 1 :]) for i, c in enumerate(reference_L)]
        costs_NL2 = meter.costs(choosing, alone)
        kl_L = costs_NL2[..., 1].mean(0)
        cost_LC = predicted_cost(kl_L, error_LC, reference_L)

        chosen = allocate(pairs_C, cost_LC, total)
        same = best_alike(pairs_C, cost_LC, total)
        plans = {PER_LAYER: tuple(specs[c] for c in chosen), ALIKE: (specs[same],) * num_layers}
        whole_kl = meter.costs(choosing, list(plans.values()))[..., 1].mean(0)
        chosen_kl = {name: float(kl) for name, kl in zip(plans, whole_kl)}
        how = min(plans, key=lambda name: chosen_kl[name])
        taken = chosen if how == PER_LAYER else [same] * num_layers
        found_N23 = meter.costs(others, [plans[how], plans[ALIKE]])

    clusters = [piece.cluster for piece in others]
    regret_N2 = found_N23[..., 0]
    layers = range(num_layers)
    return Tuning(
        seq_len=length,
        budget=budget,
        plan=plans[how],
        alike=specs[same],
        how=how,
        reference=tuple(specs[c] for c in reference_L),
        regret_L=[_paired(costs_NL2[:, i, 0], [piece.cluster for piece in choosing]) for i in layers],
        kl_L=kl_L,
        captured_L=captured_LC[layers, taken],
        expected_L=cost_LC[layers, taken],
        chosen_kl=chosen_kl,
        full_loss=_paired(found_N23[:, 0, 2], clusters).mean,
        regret=_paired(regret_N2[:, 0], clusters),
        kl=float(found_N23[:, 0, 1].mean()),
        alike_regret=_paired(regret_N2[:, 1], clusters),
        alike_kl=float(found_N23[:, 1, 1].mean()),
        minus_alike=_paired(regret_N2[:, 0] - regret_N2[:, 1], clusters),
        num_documents=(len(choosing), len(others)),
    )


def _paired(values_N: np.ndarray, clusters: Sequence[str]) -> Paired:
    found = clustered_mean(values_N, np.ones(len(values_N)), clusters)
    return Paired(float(found.mean), float(half_width(found.se, found.freedom)))


class _Meter:
    """Measures what is not in the ledger yet."""

    def __init__(self, job: Job, dense: Plan, length: int):
        self.job, self.dense, self.length = job, dense, length
        self.model, self.device = job.context.model, job.context.device
        self.ledger = Ledger(job, "tune_attention", {"seq_len": length, "rows": MOST_ROWS, "trailing": TRAILING})
        job.say(f"parts are kept in {self.ledger.path}: the same command again goes on from there")

    def expect(self, choosing: int, others: int) -> None:
        """How much there is to do, in passes over a document: single layers take half a pass, since what lies below
        the sparse one is known."""
        work = choosing * (1 + 1 + len(self.dense) / 2 + 3) + others * 3
        self.countdown = Countdown(self.job, "tune_attention", work, unit="measurements")

    @torch.inference_mode()
    def errors(self, piece: Piece, candidates: Sequence[Moba]) -> tuple[np.ndarray, np.ndarray]:
        """([L, C] squared distance of the attention's output from full attention's over the squared output, [L, C]
        share of the probability captured), both over the last queries of the document, in the dense model."""
        key = ("errors", piece.key, _digest(candidates))
        if key in self.ledger:
            self.countdown.skip(1)
        else:
            rows: list[Tensor] = []

            def observe(layer: MoBAAttention, q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> None:
                rows.append(distances(q, k, v, candidates))

            with _observed(self.model, observe):
                self._inputs(piece.batch.to(self.device))
            self.ledger.put({key: torch.stack(rows).permute(1, 0, 2).tolist()})
            self.countdown.step(1, 1)
        error_LC, captured_LC = np.array(self.ledger[key])
        return error_LC, captured_LC

    @torch.inference_mode()
    def costs(self, pieces: Sequence[Piece], plans: Sequence[Plan]) -> np.ndarray:
        """[N, plans, (regret, kl, full attention's loss)] of whole plans, nats per token."""
        found = np.zeros((len(pieces), len(plans), 3))
        work = [1 - self._first(plan) / len(plan) for plan in plans]
        for n, piece in enumerate(pieces):
            keys = [("plan", piece.key, _digest(plan)) for plan in plans]
            missing = [i for i, key in enumerate(keys) if key not in self.ledger]
            self.countdown.skip((not missing) + sum(work[i] for i in range(len(plans)) if i not in missing))
            if missing:
                self._measure(piece, {keys[i]: plans[i] for i in missing})
            found[n] = [self.ledger[key] for key in keys]
        return found

    def _measure(self, piece: Piece, plans: Mapping[tuple, Plan]) -> None:
        batch, rows_R = piece.batch.to(self.device), piece.rows_R.to(self.device)
        inputs = self._inputs(batch)
        full_R, full_RV = self._predictions(batch, rows_R, inputs[-1])
        self.countdown.step(1, 1)
        for key, plan in plans.items():
            first = self._first(plan)
            with under(self.model, plan):
                hidden_TC = self._inputs(batch, inputs[first], first)[-1]
            own_R, own_RV = self._predictions(batch, rows_R, hidden_TC)
            kl = (full_RV.exp() * (full_RV - own_RV)).sum(-1).double().mean()
            self.ledger.put({key: [x.item() for x in ((own_R - full_R).mean(), kl, full_R.mean())]})
            self.countdown.step(1 - first / len(plan), 1)

    def _first(self, plan: Plan) -> int:
        """The first layer that is not as in the dense model."""
        return next((i for i, (ours, full) in enumerate(zip(plan, self.dense)) if ours != full), len(plan) - 1)

    def _inputs(self, batch: Batch, x_TC: Tensor | None = None, first: int = 0) -> list[Tensor]:
        """What the layers from `first` on get, [T, C] each, and last what the last one gives; x_TC is what `first`
        gets, None: the embedded tokens."""
        backbone = self.model.model
        cos_TD, sin_TD = self.model.rope.cos_sin(batch.positions, torch.float32, batch.tokens.device)
        inputs = [backbone.embed_tokens(batch.tokens) if x_TC is None else x_TC]
        for layer in backbone.layers[first:]:
            after_TC = layer(inputs[-1], cos_TD, sin_TD, batch.documents)
            inputs = [*inputs, after_TC] if first == 0 and x_TC is None else [after_TC]
        return inputs

    def _predictions(self, batch: Batch, rows_R: Tensor, hidden_TC: Tensor) -> tuple[Tensor, Tensor]:
        """(loss float64 [R], log-probabilities float32 [R, V]) of the document's rows, from what the last layer
        gives."""
        log_RV = self.model.lm_head(self.model.model.norm(hidden_TC[rows_R])).float().log_softmax(-1)
        return -log_RV.gather(1, batch.labels[rows_R, None])[:, 0].double(), log_RV


def distances(q: Tensor, k: Tensor, v: Tensor, candidates: Sequence[Moba]) -> Tensor:
    """float64 [2 (squared error over squared output, captured share), C] of the last queries of one document, over them
    and all heads. q is [T, H, D], k and v [T, G, D].

    Attention to each block by itself is computed once for a block size; a candidate's output is the mean of those of
    the blocks it selects, by their shares of the probability.
    """
    length, group = len(q), q.shape[1] // k.shape[1]
    count = min(max(1, length // TRAILING), MOST_ROWS)
    q_RHD, documents = q[-count:], Documents.from_lengths([count], [length], device=q.device)
    found: dict[Moba, Tensor] = {}
    for size in dict.fromkeys(spec.block_size for spec in candidates):
        own = [spec for spec in candidates if spec.block_size == size]
        picks = [select(spec.routing, q_RHD, k, documents=documents) for spec in own]
        num_blocks = -(-length // size)
        padded = [F.pad(x.float(), (0, 0, 0, 0, 0, num_blocks * size - length)) for x in (k, v)]
        k_HMBD, v_HMBD = (x.unflatten(0, (-1, size)).permute(2, 0, 1, 3).repeat_interleave(group, 0) for x in padded)
        key_MB = torch.arange(num_blocks * size, device=q.device).view(num_blocks, size)
        sums = torch.zeros(len(own), 2, dtype=torch.float64, device=q.device)
        squared = torch.zeros((), dtype=torch.float64, device=q.device)
        step = max(1, MASS_ELEMENTS // (q.shape[1] * num_blocks * max(size, q.shape[2])))
        for start in range(0, count, step):
            rows = slice(start, min(start + step, count))
            place_r = length - count + torch.arange(rows.start, rows.stop, device=q.device)
            scores_HrMB = torch.einsum("rhd,hmbd->hrmb", q_RHD[rows].float() * q.shape[2] ** -0.5, k_HMBD)
            scores_HrMB.masked_fill_(key_MB > place_r[:, None, None], float("-inf"))
            lse_HrM = scores_HrMB.logsumexp(-1)
            within_HrMB = scores_HrMB.sub_(lse_HrM[..., None]).exp_().nan_to_num_(0.0)
            out_HrMD = torch.einsum("hrmb,hmbd->hrmd", within_HrMB, v_HMBD)
            share_HrM = lse_HrM.softmax(-1)
            full_HrD = torch.einsum("hrm,hrmd->hrd", share_HrM, out_HrMD)
            squared += full_HrD.double().square().sum()
            for i, picked_HRK in enumerate(picks):
                picked_HrK = picked_HRK[:, rows].long()
                chosen_HrM = torch.zeros_like(share_HrM).scatter_add_(
                    2, picked_HrK.clamp(min=0), (picked_HrK >= 0).float()
                )
                kept_HrM = share_HrM * chosen_HrM
                captured_Hr = kept_HrM.sum(-1)
                out_HrD = torch.einsum("hrm,hrmd->hrd", kept_HrM / captured_Hr[..., None], out_HrMD)
                sums[i, 0] += (out_HrD - full_HrD).double().square().sum()
                sums[i, 1] += captured_Hr.double().sum()
        sums[:, 0] /= squared
        sums[:, 1] /= count * q.shape[1]
        found |= dict(zip(own, sums))
    return torch.stack([found[spec] for spec in candidates], -1)


@contextmanager
def _observed(model: Decoder, observe):
    """Hands what each layer's attention is about to use to observe(layer, q, k, v, documents), in the layers' order."""
    layers = [module for module in model.modules() if isinstance(module, MoBAAttention)]
    for layer in layers:
        layer.observer = observe
    try:
        yield
    finally:
        for layer in layers:
            layer.observer = None


def _digest(specs: Sequence[AttentionSpec]) -> str:
    return hashlib.sha256(json.dumps(entries_of(specs)).encode()).hexdigest()[:16]
