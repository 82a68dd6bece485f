"""How a model in training goes on with a held-out document: what people read beside the losses."""

from __future__ import annotations

import torch

from data.packing import Batch
from data.tokenizer import Tokenizer
from train.model.decoder import Decoder
from train.model.generation import Sampling, generate
from train.record.dashboard import Sample

NEW_TOKENS = 64
SHOWN_TOKENS = 64
SAMPLING = Sampling(temperature=0.8, top_p=0.95, seed=0)


def continued(model: Decoder, tokenizer: Tokenizer, document: str, batch: Batch) -> Sample:
    """What the model writes behind all of the document but the end that is compared: at the end of its context.

    batch: the document, one window. Neither weights nor random state change; the seed is the same each time.
    """
    tokens = batch.tokens.tolist()
    count = min(NEW_TOKENS, len(tokens) // 2)
    prompt, reference = tokens[:-count], tokens[-count:]
    # The compiled functions would be compiled again for a single token.
    with torch.compiler.set_stance("force_eager"):
        new = list(
            generate(
                model,
                prompt,
                max_new_tokens=count,
                sampling=SAMPLING,
                vocab_size=tokenizer.vocab_size,
                stop={tokenizer.eos_id},
            )
        )
    return Sample(document, *(tokenizer.decode(ids) for ids in (prompt[-SHOWN_TOKENS:], new, reference)))
