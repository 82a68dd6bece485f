"""What benchmarks/study.py takes from the runs and evaluations of a study: speeds, losses, differences."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from benchmarks.common import read_json, speeds
from conf.numbers import format_length
from evals.paired import difference
from evals.position_loss import Evaluation, load_evaluation, plain
from evals.statistics import half_width
from evals.swap import document_mean

Task = tuple[str, int]
"""(arm, seed)"""
Measured = tuple[str, int, str, Path]
"""(arm, seed, line of the evaluation, its .json)"""
AFTER_SWITCH = 10
"""Log intervals after a switch of which the largest difference is given."""


def of_run(records: Sequence[Mapping]) -> dict:
    """Speed and memory of each stage, and the losses over training."""
    stages = []
    for stage in (r for r in records if r["kind"] == "stage"):
        own = [r for r in records if r["kind"] == "train" and r["stage"] == stage["stage"]]
        if not own:  # stopped before
            continue
        about = {key: stage[key] for key in ("stage", "seq_len", "attention")}
        stages.append({**about, "tokens": stage["end"] - stage["tokens"], "steps": len(own), **speeds(own[3:] or own)})
    held_out = [{key: r.get(key) for key in ("tokens", *HELD_OUT)} for r in records if r["kind"] == "eval"]
    train = [[r["tokens"], r["loss"]] for r in records if r["kind"] == "train"]
    device = next(r["device"] for r in records if r["kind"] == "run")
    return {"device": device, "stages": stages, "held_out": held_out, "train": train}


HELD_OUT = ("loss", "trailing_loss", "recall_all")


def of_position_loss(path: Path) -> dict:
    """Of an evaluation: the loss by position, and the trailing loss with its interval."""
    record, curve = read_json(path), load_evaluation(path).curve
    width = half_width(curve.trailing.se, curve.trailing_interval_freedom)
    kept = ("tokens", "stage", "attention", "seq_len", "num_documents", "num_clusters", "edges", "mean")
    loss = float(np.nanmean(curve.mean))
    trailing = {"trailing": curve.trailing.value, "interval_95": plain([width])[0]}
    return {key: record[key] for key in kept} | {"loss": loss, **trailing}


def of_recall(path: Path) -> dict:
    """Of an evaluation: the share of right answers under each attention, of all and of far evidence, and what each gate
    does with the evidence."""
    record = read_json(path)
    (task,) = record["tasks"].values()
    right = {
        row["attention"]: {key: row[key]["accuracy"] for key in ("all", "far")}
        | {"far_interval_95": row["far"]["interval_95"]}
        for row in task["variants"]
    }
    about = {"tokens": record["tokens"], "attention": record["attention"], "seq_len": task["task"]["length"]}
    answers = task["variants"][0]["far"]["answers"]
    return about | {"far_answers": answers, "right": right, "evidence": task["evidence"]}


def of_sweep(path: Path) -> dict:
    """Of an evaluation: each setting's loss in the last eighth of the documents, minus full attention's, the share of
    full attention's probability that its blocks hold, and that of right answers of each probe."""
    record, arrays = read_json(path), np.load(path.with_suffix(".npz"))
    loss_SNB, clusters = arrays["document_loss"], arrays["document_clusters"]
    last_SN = loss_SNB[:, :, -(loss_SNB.shape[2] // 8) :].mean(-1)
    settings = [
        {key: row[key] for key in ("attention", "gate", "first_blocks", "attended_share") if key in row}
        | {"last_eighth": float(own.mean()), "minus_full": document_mean(own - last_SN[0], clusters)}
        | ({"captured": row["captured"]["mean"]} if "captured" in row else {})
        | {"right": {task: found["right"] for task, found in row["recall"].items()}}
        | {"right_minus_full": {task: found["minus_full"] for task, found in row["recall"].items()}}
        | {"nats": {task: found["nats"]["mean"] for task, found in row["recall"].items()}}
        for row, own in zip(record["settings"], last_SN)
    ]
    kept = ("tokens", "seq_len", "num_documents", "num_clusters")
    return {key: record[key] for key in kept} | {"settings": settings}


def of_needle(path: Path) -> dict:
    """Of an evaluation: the share of exact answers under each attention, at all lengths and by length."""
    record = read_json(path)
    right: dict[str, dict[str, float]] = {}
    for row in record["shares"]:
        at = "all" if row["length"] is None else format_length(row["length"])
        right.setdefault(row["arm"], {})[at] = row["exact"]["share"]
    return {"tokens": record["tokens"], "right": right}


READ = {"position_loss": of_position_loss, "recall": of_recall, "sweep": of_sweep, "needle": of_needle}


def over_seeds(evaluations: Sequence[Evaluation]) -> Evaluation:
    """The evaluation whose documents have the mean loss of those of all seeds."""
    first = evaluations[0]
    assert all(one.document_keys == first.document_keys for one in evaluations)
    loss_NB = np.mean([one.document_loss for one in evaluations], axis=0)
    return Evaluation.of_documents(
        first.curve.edges, first.document_ids, first.document_keys, first.document_clusters, loss_NB
    )


def differences(found: Sequence[Measured], reference: str) -> Iterator[dict]:
    """How far each arm's losses are above the reference's first evaluation after as many tokens and of the same
    length."""
    groups: dict[tuple, list[tuple[dict, Evaluation]]] = {}
    for name, _, line, path in found:
        record = read_json(path)
        key = (name, line, record["tokens"], record["seq_len"])
        groups.setdefault(key, []).append((record, load_evaluation(path)))
    standard: dict[tuple, list[tuple[dict, Evaluation]]] = {}
    for (name, _, *place), own in groups.items():
        if name == reference:
            standard.setdefault(tuple(place), own)
    for (name, line, *place), own in groups.items():
        against = standard.get(tuple(place), own)
        if against is own:
            continue
        ours, theirs = ([evaluation for _, evaluation in side] for side in (own, against))
        by_seed = [float(difference(a, b).by_bucket.mean[-1]) for a, b in zip(ours, theirs)]
        about = {key: own[0][0][key] for key in ("tokens", "seq_len", "stage", "attention", "dense_up_to")}
        gap = difference(over_seeds(ours), over_seeds(theirs)).summary()
        yield {"arm": name, "reference": reference, "eval": line, **about, **gap, "by_seed": by_seed}


def sweep_differences(found: Sequence[Measured], reference: str) -> Iterator[dict]:
    """How each arm's losses and right answers, under each attention of its sweep, differ from the reference's under
    full attention: document by document, means over the seeds that both have."""
    groups: dict[tuple[str, str], dict[int, Path]] = {}
    for name, seed, line, path in found:
        groups.setdefault((name, line), {})[seed] = path
    standard = next((own for (name, _), own in groups.items() if name == reference), {})
    for (name, line), own in groups.items():
        seeds = [seed for seed in own if seed in standard]
        if not seeds:
            continue
        record, clusters = read_json(own[seeds[0]]), np.load(own[seeds[0]].with_suffix(".npz"))["document_clusters"]
        ours, theirs = ([of_documents(paths[seed]) for seed in seeds] for paths in (own, standard))
        for s, row in enumerate(record["settings"]):
            if own is standard and s == 0:
                continue
            about = {"arm": name, "reference": reference, "eval": line, "tokens": record["tokens"], "seeds": seeds}
            about |= {key: row[key] for key in ("attention", "attended_share")}
            for what in ours[0]:
                value_sN = np.array([one[what][s] for one in ours])
                gap_sN = value_sN - [one[what][0] for one in theirs]
                gap = document_mean(gap_sN.mean(0), clusters) | {"by_seed": np.nanmean(gap_sN, 1).tolist()}
                about[what] = {"value": float(np.nanmean(value_sN)), "minus_reference": gap}
            yield about


def of_documents(path: Path) -> dict[str, np.ndarray]:
    """Of a sweep, [settings, documents]: mean loss, that of the last bucket, and the share of right answers of each
    probe."""
    arrays = np.load(path.with_suffix(".npz"))
    loss_SNB = arrays["document_loss"]
    right = {name.removeprefix("right_"): arrays[name] for name in arrays.files if name.startswith("right_")}
    shares = {task: found_SN3[:, :, 0] / found_SN3[:, :, 1] for task, found_SN3 in right.items()}
    return {"loss": loss_SNB.mean(2), "trailing": loss_SNB[:, :, -1], **shares}


def training_losses(records: Sequence[Mapping]) -> dict[int, float]:
    """Tokens -> loss of each log interval of a run."""
    return {row["tokens"]: row["loss"] for row in records if row["kind"] == "train"}


def after_switch(metrics: Mapping[tuple[str, int], Sequence[Mapping]], arms: tuple[str, str], seed: int) -> dict:
    """How the training losses of the first arm differ from the second's on the same batches once it has switched: up to
    the switch both have the same weights, so that the first difference is the attention's doing."""
    ours, theirs = (training_losses(metrics[arm, seed]) for arm in arms)
    at = next(r["tokens"] for r in metrics[arms[0], seed] if r["kind"] == "stage" and r["stage_index"] == 1)
    gaps = [ours[t] - theirs[t] for t in sorted(ours) if t > at and t in theirs][:AFTER_SWITCH]
    return {"seed": seed, "arm": arms[0], "against": arms[1], "tokens": at, "first": gaps[0], "largest": max(gaps)}
