"""The cost of sparse attention in each layer of a model, and the cheapest plan within a budget of attended pairs.

On a quarter of the documents (by clusters): how far each candidate's output is from full attention's, layer
by layer, in one pass of the dense model; and what the loss says with one layer sparse at a time, as the candidate that
comes closest within the budget. Both together predict every candidate's cost in every layer (evals/plan_search.py). The
best plan layer by layer, and the best with all layers alike, are then measured whole. What layers cost together is not
what they cost alone (a number is looked up by several, one after the other): from the better of the two one layer at a
time is made full, and what that gives back deals the budget out once more, a second time if this is better. The best of
all is taken. What it costs is measured on the other documents.

Two costs: `regret`, the loss minus full attention's on the same tokens, and `kl`, the divergence of the predictions
from full attention's, which is the regret that text drawn from the dense model would have. Single layers move the loss
by less than its noise; the divergence has no sampling of the next token in it, so it decides. What is left is rounding:
in bfloat16 it moves predictions by some 0.001 nats of divergence, more than most single layers do, so models in it are
measured in float16, which rounds eight times more finely, where that holds their numbers.

Shapes: N documents, L layers, C candidates (the last is full attention), R rows, V vocabulary, H heads, D head size.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from conf.numbers import format_length
from data.packing import IGNORED, Batch
from data.tokenizer import load_tokenizer
from evals import probes
from evals.ledger import Countdown, Ledger
from evals.plan_search import allocate, best_alike, pairs_share, predicted_cost
from evals.position_loss import document_key
from evals.protocol import Job, names
from evals.statistics import clustered_mean, half_width
from evals.swap import under
from evals.tuning_report import BOTH, LOSS, OBJECTIVES, RETRIEVAL, TRAILING, Judged, Paired, Plan, Tuning
from moba.documents import Documents, last_tokens
from moba.kinds import AttentionSpec, Full, Moba
from moba.kinds.moba import MEAN
from moba.kinds.plan_file import entries_of
from moba.layer import MoBAAttention
from moba.routing import gate_scores, layout_means
from train.model.decoder import Decoder
from train.record.progress import clock

T = TypeVar("T")
DISTANCES, PASSES = "distances", "passes"
"""Kinds of work: the distances of all candidates in a document, and a pass over one."""
CHOOSERS = 4
"""One in so many clusters chooses the plan: measured half as many times as there are layers, the others three times."""
MOST_ROWS = 512
"""Tokens per document whose predictions are compared, and queries whose attention is: the last piece, thinned out."""
ALIKE, PER_LAYER, REFINED = "all layers alike", "per layer", "refined"
TURNS = 2
"""How often a plan is refined, if the first turn finds a better one."""
PACK_TOKENS = 1 << 16
"""Of a pass through a layer on a GPU: documents and plans go through it together, so that small models do not wait for
launches."""
STREAM_TOKENS = 1 << 18
"""Of all documents under all plans that go through the layers side by side on a GPU; more if one document has more."""
PRODUCTS = 1 << 26
"""Of queries with keys, at once."""
REGRET, KL, FULL_LOSS, RIGHT, FULL_RIGHT = range(5)


LEAST_PROBED = 1024
"""Shorter documents have no room for probes with text around them."""


class Piece(NamedTuple):
    """A held-out document, or a probe in one."""

    key: str
    cluster: str
    batch: Batch
    rows_R: Tensor
    """int64: the tokens whose predictions are compared, ascending."""


class Split(NamedTuple):
    """Documents, or probes, on which a plan is chosen, and others on which it is tested."""

    choosing: list[Piece]
    others: list[Piece]


def chosen_objective(job: Job) -> str:
    """One of OBJECTIVES: the one asked for, else BOTH, or LOSS where documents are too short for probes."""
    asked = job.values.get("objective")
    if job.seq_len < LEAST_PROBED:
        if asked in (RETRIEVAL, BOTH):
            least = format_length(LEAST_PROBED)
            raise ValueError(f"objective={asked}: probes take seq_len={least} or more; give that, or objective={LOSS}")
        return LOSS
    return BOTH if asked is None else names({"objective": asked}, "objective", OBJECTIVES, "")[0]


def split(job: Job, objective: str = LOSS) -> dict[str, Split]:
    """By objective (LOSS and RETRIEVAL, or one of them): the job's held-out documents, and probes in them; every
    CHOOSERS-th cluster chooses. ValueError for fewer than two clusters."""
    documents = list(job.held_out())
    parts: dict[str, list[Piece]] = {}
    if objective in (LOSS, BOTH):
        parts[LOSS] = _texts(job, documents)
    if objective in (RETRIEVAL, BOTH):
        parts[RETRIEVAL] = _probes(job, documents)
    place = {cluster: i for i, cluster in enumerate(dict.fromkeys(p.cluster for p in next(iter(parts.values()))))}
    if len(place) < 2:
        raise ValueError(
            f"documents: {len(documents)} of {format_length(job.seq_len)} tokens, {len(place)} cluster(s); a plan is "
            "chosen on some and measured on others: name more by data=, or set documents= higher or seq_len= lower"
        )
    chooses = {cluster for cluster, i in place.items() if i % CHOOSERS == 0}
    return {
        name: Split([p for p in pieces if p.cluster in chooses], [p for p in pieces if p.cluster not in chooses])
        for name, pieces in parts.items()
    }


def _texts(job: Job, documents: Sequence[tuple[str, Batch]]) -> list[Piece]:
    """The trailing predictions of each document."""
    pieces = []
    for name, batch in documents:
        length = batch.tokens.numel()
        rows_R = torch.arange(length - max(1, length // TRAILING), length)
        rows_R = rows_R[batch.labels[rows_R] != IGNORED]
        if len(rows_R):  # a conversation may have no supervised token there
            rows_R = rows_R[torch.linspace(0, len(rows_R) - 1, min(len(rows_R), MOST_ROWS)).round().long()]
            pieces.append(Piece(document_key(batch), job.context.cluster_of(name), batch, rows_R))
    return pieces


def _probes(job: Job, documents: Sequence[tuple[str, Batch]]) -> list[Piece]:
    """A probe of every kind in each document, whose predictions of the answer count; places in turn."""
    tokenizer, length = load_tokenizer(job.trained.config.data.tokenizer), job.seq_len
    pieces = []
    for n, (name, batch) in enumerate(documents):
        for t, task in enumerate(probes.TASKS):
            place = probes.ASKED[(n + t * len(probes.ASKED) // len(probes.TASKS)) % len(probes.ASKED)]
            probe = probes.make_probe(name, batch.tokens.tolist(), tokenizer, task, place, length)
            labels = torch.cat([probe.tokens_T[1:], torch.tensor(probe.answer[-1:])])
            own = Batch(probe.tokens_T, labels, torch.arange(length), Documents.from_lengths([length]))
            rows_R = torch.arange(length - len(probe.answer), length)
            pieces.append(Piece(document_key(own), job.context.cluster_of(name), own, rows_R))
    return pieces


def tune(job: Job, candidates: Sequence[Moba], budget: float) -> Tuning:
    """The Tuning of a model for a share of the causal pairs. ValueError for too few documents, attention other than
    full or a kind that replaces it, or too small a budget."""
    model, length = job.context.model, job.seq_len
    dense = tuple(spec.dense() for spec in model.attention)
    entries_of(dense)  # refuses attention that no plan file can hold
    specs: list[AttentionSpec] = [*candidates, Full()]
    pairs_C = np.array([pairs_share(spec, length) for spec in specs])
    total, num_layers = budget * len(dense), len(dense)
    within_C = pairs_C <= budget
    if not within_C.any():
        hint = f"a layer attends to {pairs_C.min():.3f} of the pairs at least; give a larger budget, or block_sizes="
        raise ValueError(f"budget={budget:g}: {hint}")
    objective = chosen_objective(job)
    parts = split(job, objective)
    first = next(iter(parts.values())).choosing[0]
    # The ledger's files go by the attention in force, which is not what is measured here.
    with under(model, dense), _finely(job, first.batch):
        meter = _Meter(job, dense, length)
        meter.expect(*(sum(map(len, pieces)) for pieces in zip(*parts.values())))
        error, captured = {}, {}
        with meter.phase(f"the distance of {len(candidates)} candidates from full attention in every layer"):
            for name, (choosing, _) in parts.items():
                found = [np.mean(x, axis=0) for x in zip(*(meter.errors(piece, candidates) for piece in choosing))]
                error[name] = np.pad(found[0], ((0, 0), (0, 1)))
                captured[name] = np.pad(found[1], ((0, 0), (0, 1)), constant_values=1)
        reference_L = np.where(within_C, _total(error), np.inf).argmin(1).tolist()
        alone = [(*dense[:i], specs[c], *dense[i + 1 :]) for i, c in enumerate(reference_L)]
        with meter.phase("one layer sparse at a time"):
            costs = {name: meter.costs(choosing, alone) for name, (choosing, _) in parts.items()}
        kl_L = {name: found[..., KL].mean(0) for name, found in costs.items()}
        cost_LC = _total({name: predicted_cost(kl_L[name], error[name], reference_L) for name in parts})

        same = best_alike(pairs_C, cost_LC, total)
        at = {PER_LAYER: allocate(pairs_C, cost_LC, total), ALIKE: [same] * num_layers}
        expected = dict.fromkeys(at, cost_LC)

        def whole(plans: Sequence[Plan]) -> dict[str, np.ndarray]:
            """By objective: the mean KL divergence of whole plans on the choosing part."""
            return {name: meter.costs(own.choosing, plans)[..., KL].mean(0) for name, own in parts.items()}

        def plan_of(name: str) -> Plan:
            return tuple(specs[c] for c in at[name])

        with meter.phase(f"plans {PER_LAYER} and {ALIKE}"):
            chosen_kl = dict(zip(at, _total(whole([plan_of(name) for name in at])).tolist()))
        turned: dict[str, np.ndarray] = {}
        for turn in range(1, TURNS + 1):
            start = min(at, key=lambda name: chosen_kl[name])
            if turn > 1 and start not in turned:
                break
            opened = [(*plan_of(start)[:i], Full(), *plan_of(start)[i + 1 :]) for i in range(num_layers)]
            with meter.phase(f"the best plan, one layer full at a time (turn {turn})"):
                left = whole([plan_of(start), *opened])
            in_place = {name: predicted_cost(kl[0] - kl[1:], error[name], at[start]) for name, kl in left.items()}
            is_sparse_L1 = np.array(at[start])[:, None] < len(candidates)
            cost_in_place_LC = np.where(is_sparse_L1, _total(in_place), cost_LC)
            mean_LC = (cost_in_place_LC + expected[start]) / 2  # half a step, where a whole one is too far
            turned = dict(zip((f"{REFINED} {turn}", f"{REFINED} {turn}, half"), (cost_in_place_LC, mean_LC)))
            expected |= turned
            at |= {name: allocate(pairs_C, cost, total) for name, cost in turned.items()}
            with meter.phase(f"plans refined by that (turn {turn})"):
                chosen_kl |= zip(turned, _total(whole([plan_of(name) for name in turned])).tolist())
        how = min(at, key=lambda name: chosen_kl[name])
        taken, plans = at[how], [plan_of(how), plan_of(ALIKE)]
        with meter.phase("what the plan costs on the other documents"):
            judged = {name: meter.costs(own.others, plans) for name, own in parts.items()}

    layers, name = range(num_layers), next(iter(parts))
    return Tuning(
        seq_len=length,
        budget=budget,
        objective=objective,
        plan=plans[0],
        alike=specs[same],
        how=how,
        reference=tuple(specs[c] for c in reference_L),
        regret_L=[_paired(costs[name][:, i, REGRET], [p.cluster for p in parts[name].choosing]) for i in layers],
        kl_L=kl_L,
        captured_L={name: found[layers, taken] for name, found in captured.items()},
        expected_L=expected[how][layers, taken],
        chosen_kl=chosen_kl,
        num_chose=len(parts[name].choosing),
        judged={name: _judged(found, parts[name].others) for name, found in judged.items()},
    )


def _total(by_part: Mapping[str, np.ndarray]) -> np.ndarray:
    """The objective's parts have equal weight."""
    return np.sum(list(by_part.values()), axis=0)


def _judged(found_N25: np.ndarray, others: Sequence[Piece]) -> Judged:
    """Cost of the plan, and of the best with all layers alike, on the test documents or probes."""
    clusters = [piece.cluster for piece in others]
    regret_N2, right_N2 = found_N25[..., REGRET], found_N25[..., RIGHT]
    return Judged(
        number=len(others),
        full_loss=_paired(found_N25[:, 0, FULL_LOSS], clusters).mean,
        regret=_paired(regret_N2[:, 0], clusters),
        kl=float(found_N25[:, 0, KL].mean()),
        alike_regret=_paired(regret_N2[:, 1], clusters),
        alike_kl=float(found_N25[:, 1, KL].mean()),
        minus_alike=_paired(regret_N2[:, 0] - regret_N2[:, 1], clusters),
        full_right=float(found_N25[:, 0, FULL_RIGHT].mean()),
        right=_paired(right_N2[:, 0], clusters),
        alike_right=_paired(right_N2[:, 1], clusters),
    )


def _paired(values_N: np.ndarray, clusters: Sequence[str]) -> Paired:
    found = clustered_mean(values_N, np.ones(len(values_N)), clusters)
    return Paired(float(found.mean), float(half_width(found.se, found.freedom)))


class _Meter:
    """Measures costs, unless they are in the ledger."""

    def __init__(self, job: Job, dense: Plan, length: int):
        self.job, self.dense, self.length = job, dense, length
        self.model, self.device = job.context.model, job.context.device
        self.packs: dict[int, Documents] = {}
        on_gpu = torch.device(self.device).type == "cuda"
        self.pack_tokens, self.stream_tokens = (PACK_TOKENS, STREAM_TOKENS) if on_gpu else (1, 1)
        self.ledger = Ledger(job, "tune_attention", self._settings(length))
        job.say(f"parts are kept in {self.ledger.path}: the same command again goes on from there")

    def _settings(self, length: int) -> dict[str, Any]:
        """What measurements depend on beside the model."""
        dtype = str(self.model.lm_head.weight.dtype)
        return {"seq_len": length, "rows": MOST_ROWS, "trailing": TRAILING, "dtype": dtype}

    def expect(self, choosing: int, others: int) -> None:
        """How much there is to do, in passes over a document or probe: a change of one layer takes half a pass, since
        what lies below it is known."""
        half = len(self.dense) / 2
        passes = choosing * (1 + half + 3 + TURNS * (2 + half + 3)) + others * 3
        work = {DISTANCES: choosing, PASSES: passes}
        self.countdown = Countdown(self.job, "tune_attention", work, unit="passes through a layer")

    @contextmanager
    def phase(self, name: str):
        """Names what is done within, and says how long it took."""
        start, self.countdown.name = time.monotonic(), f"tune_attention, {name}"
        yield
        self.job.say(f"{self.countdown.name}: {clock(time.monotonic() - start)}")

    @torch.inference_mode()
    def errors(self, piece: Piece, candidates: Sequence[Moba]) -> tuple[np.ndarray, np.ndarray]:
        """([L, C] relative squared error of the attention's output against full attention, [L, C] captured share of the
        probability), both over the last queries of the document, or those of the answer, in the dense model."""
        key = ("errors", piece.key, _digest(candidates))
        if key in self.ledger:
            self.countdown.skip(1, DISTANCES)
        else:
            rows: list[Tensor] = []

            def observe(layer: MoBAAttention, q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> None:
                rows.append(distances(q, k, v, candidates, count))

            count = min(self.length - int(piece.rows_R[0]), MOST_ROWS)
            with _observed(self.model, observe):
                self._hidden([piece], [self.dense], DISTANCES)
            self.ledger.put({key: torch.stack(rows).permute(1, 0, 2).tolist()})
        error_LC, captured_LC = np.array(self.ledger[key])
        return error_LC, captured_LC

    @torch.inference_mode()
    def costs(self, pieces: Sequence[Piece], plans: Sequence[Plan]) -> np.ndarray:
        """[N, plans, 5] of whole plans: REGRET, KL and FULL_LOSS in nats per token, RIGHT and FULL_RIGHT: 1 where
        greedy decoding is right."""
        digests = [_digest(plan) for plan in plans]
        together = min(self.pack_tokens, self.stream_tokens // (1 + len(plans))) // self.length
        for some in _runs(pieces, max(1, together)):
            missing = {
                plan: digest
                for plan, digest in zip(plans, digests)
                if any(("plan", piece.key, digest) not in self.ledger for piece in some)
            }
            left = self._passes(missing) if missing else 0
            self.countdown.skip(len(some) * (self._passes(plans) - left), PASSES)
            if missing:
                self._measure(some, missing)
        return np.array([[self.ledger["plan", piece.key, digest] for digest in digests] for piece in pieces])

    def _passes(self, plans: Iterable[Plan]) -> float:
        """What `_hidden` does for a document, full attention and these plans, in passes over it."""
        return sum(len(moves) for moves, _ in _shared([self.dense, *plans])) / len(self.dense)

    def _measure(self, pieces: Sequence[Piece], plans: Mapping[Plan, str]) -> None:
        """Puts the costs of plans, given with their digests, into the ledger."""
        full_PTC, *hidden = self._hidden(pieces, [self.dense, *plans], PASSES)
        keys, found = [], []
        for p, piece in enumerate(pieces):
            rows_R, labels_R = piece.rows_R.to(self.device), piece.batch.labels[piece.rows_R].to(self.device)
            full_R, full_RV = self._predictions(full_PTC[p][rows_R], labels_R)
            for digest, own_PTC in zip(plans.values(), hidden):
                own_R, own_RV = self._predictions(own_PTC[p][rows_R], labels_R)
                kl = (full_RV.exp() * (full_RV - own_RV)).sum(-1).double().mean()
                right = [(log_RV.argmax(-1) == labels_R).all().double() for log_RV in (own_RV, full_RV)]
                keys.append(("plan", piece.key, digest))
                found.append(torch.stack([(own_R - full_R).mean(), kl, full_R.mean(), *right]))
        self.ledger.put(dict(zip(keys, torch.stack(found).tolist())))

    def _hidden(self, pieces: Sequence[Piece], plans: Sequence[Plan], kind: str) -> list[Tensor]:
        """The last layer's output [P, T, C] of all pieces, for each plan. Plans share what lies below the first layer
        in which they differ, and those with the same attention in a layer go through it in one pack."""
        number, length, backbone = len(pieces), self.length, self.model.model
        tokens_T = torch.cat([piece.batch.tokens for piece in pieces]).to(self.device)
        most = max(1, self.pack_tokens // len(tokens_T))
        rotations = self.model.rope.cos_sin(torch.arange(length), torch.float32, self.device)
        cos_TD, sin_TD = (x_TD.repeat(min(most, len(plans)) * number, 1) for x_TD in rotations)
        states, steps = {0: backbone.embed_tokens(tokens_T)}, list(_shared(plans))
        with under(self.model, self.dense):
            for layer, attention, (moves, _) in zip(backbone.layers, backbone.attentions(), steps):
                after: dict[tuple[int, AttentionSpec], Tensor] = {}
                uses = Counter(before for before, _ in moves)
                for spec in dict.fromkeys(spec for _, spec in moves):
                    attention.spec = spec
                    for some in _runs([move for move in moves if move[1] == spec], most):
                        x_TC = torch.cat([states[before] for before, _ in some])
                        uses.subtract(before for before, _ in some)
                        for before, _ in some:
                            if not uses[before]:
                                del states[before]  # of long documents there is no room for those of two layers
                        rows, documents = slice(len(x_TC)), self._documents(len(some) * number)
                        after |= zip(some, layer(x_TC, cos_TD[rows], sin_TD[rows], documents).chunk(len(some)))
                        self.countdown.step(len(some) * number / len(steps), len(some) * number, kind)
                states = {n: after[move] for n, move in enumerate(moves)}
        return [states[n].unflatten(0, (number, length)) for n in steps[-1][1]]

    def _documents(self, number: int) -> Documents:
        """A pack of so many."""
        if number not in self.packs:
            self.packs[number] = Documents.from_lengths([self.length] * number, device=self.device)
        return self.packs[number]

    def _predictions(self, hidden_RC: Tensor, labels_R: Tensor) -> tuple[Tensor, Tensor]:
        """(loss float64 [R], log-probabilities float32 [R, V]) of rows of the last layer's output."""
        log_RV = self.model.lm_head(self.model.model.norm(hidden_RC)).float().log_softmax(-1)
        return -log_RV.gather(1, labels_R[:, None])[:, 0].double(), log_RV


def distances(q: Tensor, k: Tensor, v: Tensor, candidates: Sequence[Moba], count: int) -> Tensor:
    """float64 [2 (relative squared error of the output, captured share), C] over the last `count` queries of one
    document and all heads. q is [T, H, D], k and v [T, G, D].

    What each block adds to full attention is computed once for all block sizes that are multiples of its own; a
    candidate's output is the sum over what it selects, divided by the share of the probability there.
    """
    length, group = len(q), q.shape[1] // k.shape[1]
    q_RHD, documents = q[-count:], last_tokens((count,), (length,), q.device)
    found: dict[Moba, Tensor] = {}
    sizes = sorted({spec.block_size for spec in candidates})
    while sizes:
        least = sizes[0]
        nested, sizes = [size for size in sizes if size % least == 0], [size for size in sizes if size % least]
        own = [[spec for spec in candidates if spec.block_size == size] for size in nested]
        selected = [_selected(q_RHD, k, documents, specs) for specs in own]
        specs = list(itertools.chain(*own))
        num_blocks = -(-length // least)
        padded = [F.pad(x.float(), (0, 0, 0, 0, 0, num_blocks * least - length)) for x in (k, v)]
        k_HSD, v_HSD = (x.transpose(0, 1).repeat_interleave(group, 0) for x in padded)
        v_HMBD, key_S = v_HSD.unflatten(1, (num_blocks, least)), torch.arange(k_HSD.shape[1], device=q.device)
        sums = torch.zeros(len(specs), 2, dtype=torch.float64, device=q.device)
        squared = torch.zeros((), dtype=torch.float64, device=q.device)
        step = max(1, PRODUCTS // (q.shape[1] * num_blocks * max(least, q.shape[2], len(specs))))
        for start in range(0, count, step):
            rows = slice(start, min(start + step, count))
            place_r = length - count + torch.arange(rows.start, rows.stop, device=q.device)
            scores_HrS = torch.einsum("rhd,hsd->hrs", q_RHD[rows].float() * q.shape[2] ** -0.5, k_HSD)
            share_HrS = scores_HrS.masked_fill_(key_S > place_r[:, None], float("-inf")).softmax(-1)
            share_HrMB = share_HrS.unflatten(-1, (num_blocks, least))
            share_HrM, out_HrMD = share_HrMB.sum(-1), torch.einsum("hrmb,hmbd->hrmd", share_HrMB, v_HMBD)
            chosen_NHrM = torch.cat(
                [
                    is_selected[:, :, rows].repeat_interleave(size // least, -1)[..., :num_blocks]
                    for size, is_selected in zip(nested, selected)
                ]
            ).float()
            captured_NHr = torch.einsum("nhrm,hrm->nhr", chosen_NHrM, share_HrM)
            out_NHrD = torch.einsum("nhrm,hrmd->nhrd", chosen_NHrM, out_HrMD) / captured_NHr[..., None]
            full_HrD = out_HrMD.sum(2)
            squared += full_HrD.double().square().sum()
            sums[:, 0] += (out_NHrD - full_HrD).double().square().sum((1, 2, 3))
            sums[:, 1] += captured_NHr.double().sum((1, 2))
        sums[:, 0] /= squared
        sums[:, 1] /= count * q.shape[1]
        found |= dict(zip(specs, sums))
    return torch.stack([found[spec] for spec in candidates], -1)


def _selected(q_RHD: Tensor, k: Tensor, documents: Documents, specs: Sequence[Moba]) -> Tensor:
    """bool [N, H, R, M]: which blocks each of these specs, all of one block size, selects of one document: as
    `moba.route`, but with one ranking of the blocks for all numbers of them."""
    (size,) = {spec.block_size for spec in specs}
    assert all(spec.gate == MEAN for spec in specs)
    layout = documents.layout(size)
    scores_HRM = gate_scores(q_RHD, layout_means(k, layout))
    block_M, own_R1 = torch.arange(layout.num_blocks, device=q_RHD.device), layout.query_block_T[:, None]
    is_past_RM, rank = block_M < own_R1, {}
    for first in {spec.first_blocks for spec in specs}:
        forced_HRM = scores_HRM.masked_fill(block_M < first, float("inf")).masked_fill_(~is_past_RM, float("-inf"))
        rank[first] = forced_HRM.sort(descending=True, stable=True).indices.argsort()  # of equals the earlier first
    picked_NHRM = torch.stack([rank[spec.first_blocks] < spec.top_k - 1 for spec in specs])
    return picked_NHRM.logical_and_(is_past_RM).logical_or_(block_M == own_R1)


@contextmanager
def _observed(model: Decoder, observe):
    """Calls observe(layer, q, k, v, documents) with the inputs of each layer's attention, in the layers' order."""
    layers = [module for module in model.modules() if isinstance(module, MoBAAttention)]
    for layer in layers:
        layer.observer = observe
    try:
        yield
    finally:
        for layer in layers:
            layer.observer = None


def _shared(plans: Sequence[Plan]) -> Iterator[tuple[list[tuple[int, AttentionSpec]], list[int]]]:
    """For each layer what is different among plans, each a (place in this list for the layer before, attention), and
    the place of each plan: plans share what lies below the first layer in which they differ."""
    place = [0] * len(plans)
    for specs in zip(*plans):
        moves: dict[tuple[int, AttentionSpec], int] = {}
        place = [moves.setdefault(move, len(moves)) for move in zip(place, specs)]
        yield list(moves), place


def _runs(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """The items, so many at a time."""
    return (items[i : i + size] for i in range(0, len(items), size))


@contextmanager
def _finely(job: Job, batch: Batch):
    """A bfloat16 model in float16 meanwhile, unless its numbers on this text exceed that."""
    model = job.context.model
    was = {weight: weight.data for weight in model.parameters() if weight.dtype == torch.bfloat16}
    try:
        for weight in was:
            weight.data = weight.data.half()
        if was:
            batch = batch.to(job.context.device)
            with torch.inference_mode():
                logits = model.logits(batch.tokens, batch.positions, batch.documents, rows=batch.positions[-1:])
            if not logits.isfinite().all():
                job.say("float16 cannot hold this model's numbers: bfloat16 is used, whose rounding hides small costs")
                _restore(was)
        yield
    finally:
        _restore(was)


def _restore(data: Mapping[torch.nn.Parameter, Tensor]) -> None:
    for weight, own in data.items():
        weight.data = own


def _digest(specs: Sequence[AttentionSpec]) -> str:
    return hashlib.sha256(json.dumps(entries_of(specs)).encode()).hexdigest()[:16]
