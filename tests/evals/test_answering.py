"""evals/answering.py: prompts read and answered side by side against one at a time, and against one forward pass."""

import pytest
import torch

from conf.schema import ModelConfig
from evals.answering import Reader
from moba.documents import Documents
from moba.kinds import Full, Moba
from train.model.decoder import Decoder
from train.model.generation import Sampling, generate

VOCAB, ROWS = 40, 48
SPARSE, DENSE = (Moba(8, 2), Moba(8, 2)), (Full(), Full())
PROMPTS = [
    [int(x) for x in torch.randint(VOCAB, (n,), generator=torch.Generator().manual_seed(n))] for n in (61, 24, 90)
]


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
    answers = [[3], [7, 0, 21, 30, 6], [39, 2]]
    reader = Reader(model, 3, VOCAB)
    reader.read(PROMPTS, SPARSE)
    found = reader.log_likelihood(answers, SPARSE)
    for prompt, answer, value in zip(PROMPTS, answers, found):
        log_probs = forward(model, prompt + answer)
        expected = sum(log_probs[len(prompt) - 1 + i, token] for i, token in enumerate(answer))
        assert value == pytest.approx(float(expected), abs=1e-5)
    assert reader.log_likelihood(answers, SPARSE) == found
    hybrid = reader.log_likelihood(answers, DENSE)
    assert hybrid[0] == found[0], "the first token is the prompt's"
    assert hybrid[1] != pytest.approx(found[1], abs=1e-3)
    assert reader.log_likelihood([[3], [4], [5]], SPARSE)[0] == pytest.approx(found[0])
