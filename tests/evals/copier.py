"""A model of bytes that answers as it is told, and what an eval needs to be run on it."""

from types import SimpleNamespace

import torch

from data.tokenizer import load_tokenizer
from evals.context import Context
from evals.protocol import Job
from moba.kinds import Moba

BYTES, PLAN = load_tokenizer("bytes"), (Moba(64, 2),)


class Copier:
    """A model of bytes that reads what the cache was given and says what `answer(text)` says comes next, surely.

    `answer` has the text so far and gives the rest of it. Attends to nothing; counts its passes."""

    def __init__(self, answer, plan=PLAN):
        self.attention, self.answer, self.passes, self.seen = tuple(plan), answer, 0, {}
        self.rope = SimpleNamespace(longest=None)
        self.model = SimpleNamespace(embed_tokens=SimpleNamespace(weight=torch.zeros(1)))

    def set_attention(self, plan):
        self.attention = tuple(plan)

    def logits(self, tokens, positions, documents, cache, rows):
        self.passes += 1
        lengths, row, scores = documents.host_lengths()[0], 0, []
        ways = len(lengths) // len(cache[0].sequences)
        for sequence, length in zip(cache[0].sequences * ways, lengths):
            known = self.seen.setdefault(sequence, [])
            del known[sequence.length :]
            assert len(known) == sequence.length and positions[row : row + length].tolist() == list(
                range(len(known), len(known) + length)
            )
            if ways == 1:
                sequence.append(*(torch.zeros(length, 1, 1) for _ in range(2)))
            for i in range(row, row + length):
                known.append(int(tokens[i]))
                if i in rows.tolist():
                    rest = self.answer(bytes(t for t in known if t < 256).decode(errors="replace"), self.attention)
                    scores.append(torch.zeros(BYTES.vocab_size).index_fill_(0, torch.tensor(rest.encode()[0]), 20.0))
            row += length
        return torch.stack(scores) if scores else torch.zeros(0, BYTES.vocab_size)


def make_job(tmp_path, model, **values):
    tmp_path.mkdir(exist_ok=True)
    stage = SimpleNamespace(seq_len=2048, attention=PLAN)
    data, run = SimpleNamespace(tokenizer="bytes"), SimpleNamespace(name="toy")
    config = SimpleNamespace(data=data, run=run)
    trained = SimpleNamespace(
        config=config, stage=stage, tokens=7, checkpoint=tmp_path, device=torch.device("cpu"), model=model
    )
    return Job(Context(model, "cpu"), trained, {"samples": "3", "depths": "4", **values}, tmp_path / "evals")
