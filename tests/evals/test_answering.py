"""evals/answering.py: prompts read and answered side by side against one at a time, and against one forward pass."""

from types import SimpleNamespace

import pytest
import torch

import evals.answering
import moba.kv_cache
from conf.schema import ModelConfig
from evals.answering import Reader, batch_tokens
from evals.context import Context
from moba.documents import Documents
from moba.kinds import Full, Moba, Sliding
from train.model.decoder import Decoder
from train.model.generation import Sampling, generate

VOCAB, ROWS = 40, 48
SPARSE, DENSE = (Moba(8, 2), Moba(8, 2)), (Full(), Full())
PROMPTS = [
    [int(x) for x in torch.randint(VOCAB, (n,), generator=torch.Generator().manual_seed(n))] for n in (61, 24, 90)
]

ANSWERS = [[[3], [5, 5, 5], [31] * 11], [[7, 0, 21, 30, 6]], [[39, 2], [36]]]
"""A few to each text: of one token, and across the end of a block."""
WAYS = [[own[min(n, len(own) - 1)] for own in ANSWERS] for n in range(3)]


@pytest.fixture(scope="module")
def model():
    """Sharp scores, so that every token has its say, and key convolution, which has a past of its own."""
    config = ModelConfig(
        hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=16, ffn_size=48, init_std=0.5, key_conv=3
    )
    model = Decoder(config, ROWS)
    model.init_weights(1)
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.k_conv.weight, std=0.3, generator=torch.Generator().manual_seed(3))
    model.set_attention(SPARSE)
    return model.eval().double()


def forward(model, tokens):
    """[T, V] log-probabilities of one pass."""
    with torch.no_grad():
        scores = model.logits(torch.tensor(tokens), torch.arange(len(tokens)), Documents.from_lengths([len(tokens)]))
    return scores[:, :VOCAB].log_softmax(-1)


@pytest.mark.parametrize("decode", [SPARSE, DENSE], ids=["moba", "hybrid"])
def test_side_by_side_is_one_by_one(model, decode):
    """Catches texts that see each other, or go on where another one ends, a plan of the wrong part, and answers that
    leave traces: each text is answered twice, and again after reading on and going back."""
    with torch.no_grad():
        alone = [
            list(
                generate(
                    model, prompt, max_new_tokens=12, sampling=Sampling(temperature=0), vocab_size=VOCAB, decode=decode
                )
            )
            for prompt in PROMPTS
        ]
    reader = Reader(model, 3, VOCAB, chunk_tokens=21)
    reader.read([prompt[:9] for prompt in PROMPTS], SPARSE)
    mark = reader.mark()
    reader.read([[1] * 30, [], [2] * 7], SPARSE)
    reader.rewind(mark)
    reader.read([prompt[9:] for prompt in PROMPTS], SPARSE)
    assert reader.greedy(12, decode) == alone == reader.greedy(12, decode)
    assert len({tuple(text) for text in alone}) == 3 and model.attention == SPARSE
    stop = alone[0][5]
    cut = [text[: text.index(stop)] if stop in text else text for text in alone]
    assert reader.greedy(12, decode, stop={stop}) == cut != alone


def test_likelihood_is_that_of_one_pass(model):
    """Catches scores one token off, a token left out, ids beyond the vocabulary that take probability, and dense
    attention in sparse answers."""
    reader = Reader(model, 3, VOCAB)
    reader.read(PROMPTS, SPARSE)
    answers = [[*own, likeliest] for own, likeliest in zip(ANSWERS, reader.greedy(5, SPARSE))]
    found = reader.score(answers, SPARSE)
    for prompt, own, values in zip(PROMPTS, answers, found, strict=True):
        for answer, (value, is_greedy) in zip(own, values, strict=True):
            log_probs = forward(model, prompt + answer)[len(prompt) - 1 : -1]
            assert value == pytest.approx(float(log_probs[range(len(answer)), answer].sum()), abs=1e-5)
            assert is_greedy == (log_probs.argmax(-1).tolist() == answer)
    assert {is_greedy for values in found for _, is_greedy in values} == {True, False}
    assert reader.score(answers, SPARSE) == found
    hybrid = reader.score(answers, DENSE)
    assert hybrid[0][0] == found[0][0], "the first token is the prompt's"
    assert hybrid[1][0][0] != pytest.approx(found[1][0][0], abs=1e-3)
    assert reader.score([[[3]], [[4]], [[5]]], SPARSE)[0][0][0] == pytest.approx(found[0][0][0])


@pytest.mark.parametrize("tokens", [2, 17, 33])
@pytest.mark.parametrize("plan", [SPARSE, DENSE, (Sliding(7), Moba(8, 3, first_blocks=1))], ids=["moba", "full", "mix"])
def test_answers_in_one_pass_are_those_one_by_one(model, monkeypatch, plan, tokens):
    """Catches answers that see each other, or what is filled up behind a shorter one, blocks that an answer completes
    with another's keys, a key convolution that goes on from another answer, an answer that is left in the text, and
    values of another answer where they are read a few at a time, or one in parts."""
    alone = Reader(model, 3, VOCAB)
    alone.read(PROMPTS, SPARSE)
    want = [[alone.score([[answer] for answer in way], plan)[i][0] for way in WAYS] for i in range(3)]
    reader = Reader(model, 3, VOCAB)
    reader.read(PROMPTS, SPARSE)
    before, passes = reader.greedy(6, plan), []
    in_ways = moba.kv_cache.KVCache.in_ways
    monkeypatch.setattr(moba.kv_cache.KVCache, "in_ways", lambda cache, n: passes.append(n) or in_ways(cache, n))
    monkeypatch.setattr(evals.answering, "SCORED_TOKENS", 3 * tokens)
    found = reader.score(ANSWERS, plan)
    for own, values, expected in zip(ANSWERS, found, want):
        assert len(values) == len(own)
        assert [greedy for _, greedy in values] == [greedy for _, greedy in expected[: len(own)]]
        assert [value for value, _ in values] == pytest.approx([value for value, _ in expected[: len(own)]], abs=1e-5)
    assert passes == {33: [3], 17: [1, 1, 1]}.get(tokens, passes) and reader.greedy(6, plan) == before


def test_what_is_written_is_looked_at_now_and_then(model, monkeypatch):
    """Catches a wait for the device at each token, tokens lost between two looks, and texts that go on behind their
    end."""
    reader = Reader(model, 3, VOCAB)
    reader.read(PROMPTS, SPARSE)
    want, looks = reader.greedy(21, SPARSE), []
    stop = want[0][9]
    goes_on = evals.answering._goes_on
    monkeypatch.setattr(evals.answering, "_goes_on", lambda *given: looks.append(len(given[1])) or goes_on(*given))
    assert reader.greedy(21, SPARSE) == want and looks == [8] * 6 + [5] * 3
    cut = [text[: text.index(stop)] if stop in text else text for text in want]
    assert reader.greedy(21, SPARSE, stop={stop}) == cut != want
    looks.clear()
    seven = [text[:7] for text in want]
    assert reader.greedy(21, SPARSE, done=lambda text: len(text) == 7) == seven and looks == [8] * 3


def test_room_that_is_made_at_once_is_not_made_again(model):
    """Catches a cache that is copied, and doubled, for an answer whose length was known."""
    for length, capacity, expected in ((250, 400, 400), (250, 0, 512), (30, 50, 50)):
        reader = Reader(model, 2, VOCAB, capacity)
        reader.read([[1] * length, [2] * 24], SPARSE)
        reader.greedy(20, SPARSE)
        assert reader._cache[0].sequences[0].storage.capacity == expected


@pytest.mark.parametrize(("spare", "expected"), [(80e9, 1 << 18), (8e9, 31_250), (1e5, 1), (-1e9, 1)])
def test_a_batch_fits_the_gpu(monkeypatch, spare, expected):
    """Catches a cache that takes more than its share of a small GPU, or of one that the weights alone fill: two layers
    of 2 key/value heads of size 4000 in float32 take 128 KB a token."""
    sizes = {"hidden_size": 4, "num_layers": 2, "num_heads": 2, "num_kv_heads": 2, "head_dim": 4000, "ffn_size": 4}
    model = Decoder(ModelConfig(**sizes), 2)
    weights = sum(4 * parameter.numel() for parameter in model.parameters())
    memory = weights + int(spare)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=memory))
    assert batch_tokens(Context(model, "cuda")) == expected
    assert batch_tokens(Context(model, "cpu")) == 1 << 16


def test_filling_up_does_not_leave_the_positions():
    """Catches short answers behind a long text that are filled up to where the model has no positions."""
    sizes = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "head_dim": 16, "ffn_size": 48}
    scaling = {"rope_type": "dynamic", "factor": 2.0}
    model = Decoder(ModelConfig(**sizes, rope_scaling=scaling, pretrained_length=64), ROWS).eval().double()
    model.init_weights(1)
    model.set_attention(SPARSE)
    texts, answers = [[1] * 62, [2] * 9], [[[3, 4], [5]], [[6] * 40, [7]]]
    reader = Reader(model, 2, VOCAB)
    reader.read(texts, SPARSE)
    for text, own, values in zip(texts, answers, reader.score(answers, SPARSE)):
        for answer, (value, _) in zip(own, values):
            log_probs = forward(model, text + answer)[len(text) - 1 : -1]
            assert value == pytest.approx(float(log_probs[range(len(answer)), answer].sum()), abs=1e-5)


def test_texts_are_those_that_transformers_writes():
    """Catches what a comparison with this project's own passes cannot: the same weights as a Llama of transformers,
    with grouped heads, over its cache; prompts shorter than a block and of different lengths, and answers that cross
    blocks, under both attentions of the answer, and that end at EOS."""
    transformers = pytest.importorskip("transformers")
    import moba.transformers

    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=ROWS,
        rms_norm_eps=1e-5,
        initializer_range=0.4,
        pad_token_id=0,
    )
    torch.manual_seed(5)
    theirs = transformers.LlamaForCausalLM(config).double().eval()
    sizes = {"hidden_size": 32, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "ffn_size": 48}
    ours = Decoder(ModelConfig(**sizes, tie_embeddings=False), ROWS).double().eval()
    ours.load_state_dict(theirs.state_dict())

    def written(prompt, stop):
        ids = torch.tensor([prompt])
        options = {"max_new_tokens": 21, "do_sample": False, "eos_token_id": stop}
        return theirs.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, len(prompt) :].tolist()

    plan = (Moba(8, 2), Full(), Moba(8, 3, first_blocks=1))
    prompts = [*PROMPTS, [3, 1, 4], [5] * 8]
    options = {"max_new_tokens": 21, "sampling": Sampling(temperature=0), "prefill": plan, "chunk_tokens": 17}
    found = []
    for mode, decode in (("moba", plan), ("full", (Full(),) * 3)):
        moba.transformers.configure(theirs, plan=plan, decode=mode)
        want = [written(prompt, None) for prompt in prompts]
        reader = Reader(ours, len(prompts), ROWS, chunk_tokens=50)
        reader.read(prompts, plan)
        assert reader.greedy(21, decode) == want
        assert [list(generate(ours, prompt, decode=decode, **options)) for prompt in prompts] == want
        stop = want[3][13]
        cut = [written(prompt, stop) for prompt in prompts]
        assert reader.greedy(21, decode, stop={stop}) == [text[:-1] if text[-1] == stop else text for text in cut]
        assert cut != want and len({tuple(text) for text in want}) == len(prompts)
        found.append(want)
    assert found[0] != found[1]
