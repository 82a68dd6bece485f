"""Documents to batches: tokenizers, token shards, sources, the mixture, packing and the loader.

A training run reads one kind of source only, memory-mapped token shards (data/shards.py); text in any form is tokenised
into such shards once (data/sources.py, launch/prepare_data.py). Nothing here knows the attention kind, the schedule or
the ranks' process group: the loader is told its rank and the stage's lengths.
"""
