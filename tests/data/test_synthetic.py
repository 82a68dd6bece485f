"""data/synthetic.py: each task's answers can be looked up where they are said to stand, by a plain search; documents
follow from their seeds; and the way into a run."""

import numpy as np
import pytest

from conf.schema import DataConfig, SourceConfig, SyntheticConfig
from data.errors import DataError
from data.loader import Loader
from data.packing import IGNORED
from data.sources import open_sources, open_validation
from data.synthetic import SIZES, SyntheticSource
from data.validation import held_out_documents

LENGTH = 256


def make(task, **options):
    return SyntheticSource("x", SyntheticConfig(task=task, length=LENGTH, **options), 258)


@pytest.mark.parametrize("task", SIZES)
def test_answers_stand_where_they_are_said_to(task):
    """Catches questions whose value is another one's, evidence that was overwritten or stands twice, and masks that
    learn filler: a reader who searches the text for the question gives every answer."""
    source = make(task, pairs=8, min_pairs=2, block_size=32)
    key_tokens, value_tokens = SIZES[task]
    numbers, starts = set(), set()
    for i in range(40):
        sample = source.sample(i)
        tokens, supervised = sample.tokens, np.zeros(LENGTH + 1, dtype=bool)
        assert tokens.shape == (LENGTH + 1,) and tokens.min() >= 0 and tokens.max() < 256
        numbers.add(len(sample.answers))
        for start, length, needle in sample.answers:
            assert length == value_tokens
            question = tokens[start - key_tokens : start]
            found = [
                p + key_tokens
                for p in range(start - 2 * key_tokens + 1)
                if (tokens[p : p + key_tokens] == question).all()
            ]
            earlier = [
                p for p in found if p in {a.needle for a in sample.answers} or task not in ("mqar", "multi_query")
            ]
            assert needle in earlier and (task == "copy" or earlier == [needle])
            np.testing.assert_array_equal(tokens[needle : needle + length], tokens[start : start + length])
            assert needle + length <= start - key_tokens
            starts.add(needle)
            supervised[start : start + length] = True
            if task == "straddle":
                assert needle % 32 == 0, "the value opens a block, the key closed the one before"
        np.testing.assert_array_equal(sample.supervised, supervised)
        if task in ("mqar", "multi_query"):
            assert max(a.needle for a in sample.answers) < LENGTH // 2 + (task == "multi_query") * LENGTH
    assert numbers == ({1} if task not in ("mqar", "multi_query") else numbers) and len(starts) > 5
    assert task not in ("mqar", "multi_query") or (max(numbers) == 8 and min(numbers) == 2)


@pytest.mark.parametrize("task", ["mqar", "multi_query"])
def test_repeated_questions_point_to_the_latest_occurrence(task):
    """Catches distances measured to a pair that an earlier question has repeated since, and keys asked too seldom."""
    source = make(task, pairs=5, min_pairs=3, repeats=4)
    for i in range(20):
        tokens, answers = (sample := source.sample(i)).tokens, sample.answers
        asked = [int(tokens[a.start - 1]) for a in answers]
        assert sorted(asked) == sorted(list(set(asked)) * 4) and 3 <= len(set(asked)) <= 5
        assert [a.start for a in answers] == sorted(a.start for a in answers)
        for (start, _, needle), key in zip(answers, asked):
            before = [p for p in range(start - 1) if tokens[p] == key]
            assert needle == before[-1] + 1 and tokens[needle] == tokens[start]


def test_documents_follow_from_seed_and_number():
    """Catches documents that depend on what was read before, and held-out ones that training sees."""
    source, again = make("mqar"), make("mqar")
    late = again.sample(7).tokens
    for i in range(8):
        source.sample(i)
    np.testing.assert_array_equal(source.sample(7).tokens, late)
    others = [make("mqar", seed=1), SyntheticSource("x", SyntheticConfig(length=LENGTH), 258, held_out=True)]
    assert len({one.fingerprint for one in (source, *others)}) == 3 and source.fingerprint == again.fingerprint
    assert not any((one.sample(7).tokens == late).all() for one in others)
    rows = np.stack([source.sample(i).tokens for i in range(50)])
    assert len(np.unique(rows, axis=0)) == 50


def test_a_run_reads_whole_documents_and_learns_answers_alone():
    """Catches documents that are cut, labels outside answers, and a held-out set that cannot be measured."""
    synthetic = SyntheticConfig(task="mqar", length=LENGTH, pairs=6)
    config = DataConfig(
        sources={"mqar": SourceConfig(synthetic=synthetic)}, validation=SourceConfig(synthetic=synthetic)
    )
    sources = open_sources(config)
    loader = Loader(sources, seed=0)
    loader.set_stage(seq_len=2 * LENGTH, batch_tokens=4 * LENGTH, micro_tokens=2 * LENGTH, mix={"mqar": 1.0})
    seen = []
    for batch in [b for _ in range(2) for b in loader.next_step()]:
        assert batch.lengths == (LENGTH, LENGTH)
        for window, start in zip(batch.windows, (0, LENGTH)):
            sample = sources["mqar"].sample(window.document)
            labels = np.where(sample.supervised[1:], sample.tokens[1:], IGNORED)
            np.testing.assert_array_equal(batch.labels[start : start + LENGTH].numpy(), labels)
            np.testing.assert_array_equal(batch.tokens[start : start + LENGTH].numpy(), sample.tokens[:-1])
            assert (labels != IGNORED).sum() == 6
            seen.append(window.document)
    assert len(set(seen)) == 8
    held_out = held_out_documents(open_validation(config), LENGTH, 5)
    assert len(held_out) == 5 and all((batch.labels != IGNORED).sum() == 6 for _, batch in held_out)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"task": "mqar", "symbols": 300}, ["symbols=300", "258"]),
        ({"task": "mqar", "pairs": 64}, ["length=256", "260"]),
        ({"task": "mqar", "symbols": 8, "pairs": 5}, ["5 pairs", "symbols=8"]),
        ({"task": "multi_key", "key_tokens": 1, "symbols": 128}, ["85 pairs", "key_tokens"]),
        ({"task": "straddle", "block_size": 128}, ["length=256", "266"]),
    ],
)
def test_what_does_not_fit_is_named(options, words):
    """Catches a task that loops for ever, or writes pairs over each other, where there is no room."""
    with pytest.raises(DataError) as error:
        SyntheticSource("x", SyntheticConfig(**{"length": LENGTH, **options}), 258)
    assert all(word in str(error.value) for word in words), error.value
