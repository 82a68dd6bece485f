"""Run under torchrun by test_export.py: imports models into engines and saves checkpoints of them, without a step.

Each line of the file argv[1] is a JSON list: run directory, tokens at which to save, overrides.
"""

import json
import sys
from pathlib import Path

import torch
import yaml

ROOT = Path(__file__).resolve().parents[2]
sys.path[:] = [str(ROOT)] + [p for p in sys.path if Path(p or ".").resolve() != Path(__file__).resolve().parent]

from conf.trajectory import to_dict  # noqa: E402
from launch.config import load  # noqa: E402
from train.checkpoint import store  # noqa: E402
from train.engine.optim import build_engine  # noqa: E402
from train.engine.world import init_world, leave, shutdown  # noqa: E402
from train.hf import pretrained  # noqa: E402
from train.model.decoder import Decoder  # noqa: E402

world = init_world("cpu")
for line in Path(sys.argv[1]).read_text().splitlines():
    run_dir, tokens, overrides = json.loads(line)
    config = load(overrides)
    model = Decoder(config.model, config.model.vocab_size)
    model.init_weights(seed=1)
    engine = build_engine(model, config, world)
    pretrained.load_engine(engine, config.model, config.init.source)
    store.save(
        Path(run_dir),
        engine,
        tokens=tokens,
        state={},
        tensors={"none": torch.zeros(1)},
        config_yaml=yaml.safe_dump(to_dict(config), sort_keys=False),
        stage_end=False,
        keep=1,
    )
    engine.destroy()
shutdown()
leave(0)
