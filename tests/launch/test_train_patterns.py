"""A training run of FlashMoBA's layout end to end: from windows and MoBA to windows and full attention, killed and
resumed, then read by the commands that use a finished run."""

import pytest
from launch_runs import LINE, Act, course, newest, train_losses, weights_of

from evals.loading import load_trained
from launch import export, generate
from moba.kinds import Full, Moba, Sliding

LAYOUT = [
    "model.rope_pattern=RN",
    "model.key_conv=3",
    "model.key_conv_pattern=-K",
    "schedule.window=24",
    "schedule.stages.sparse.attention.pattern=SM",
    "schedule.stages.full.attention.pattern=SF",
    "data.validation=null",
    "schedule.tokens=4K",
]
SLIDING, MOBA, FULL = Sliding(window=24), Moba(16, 3), Full()


def test_a_patterned_run_goes_on_where_it_was_killed(launcher, command, house, capsys):
    """Catches a convolution that is not saved, stays at zero or is lost at a switch; a stage that changes more than its
    global layers; a resume that differs in a bit, before the switch; a run that generation cannot read; and an export
    that leaves out what transformers has not."""
    house.runs.mkdir(exist_ok=True)
    whole, resumed = house.runs / "patterns", house.runs / "patterns-killed"
    ended = launcher.run(command("patterns", *LAYOUT))
    assert ended.code == 0 and "sliding 24 (layer 0), moba 16x3 (layer 1)" in ended.out, ended
    killed = launcher.run(command("patterns-killed", *LAYOUT, "checkpoint.asynchronous=false"), act=Act(LINE, count=6))
    assert killed.code == -9 and newest(resumed).name == "tokens_000000000001536", killed
    assert 0 < len(train_losses(resumed)) < len(train_losses(whole)) == 7
    ended = launcher.run(command("patterns-killed", *LAYOUT, "checkpoint.asynchronous=false"))
    assert ended.code == 0 and "000001536: 1,536 of 4,608 tokens" in ended.out, ended
    assert course(resumed) == course(whole) and weights_of(resumed) == weights_of(whole)
    plans = {"sparse": "sliding 24 (layer 0), moba 16x3 (layer 1)", "full": "sliding 24 (layer 0), full (layer 1)"}
    assert {r["stage"]: r["attention"] for r in course(whole) if r["kind"] == "train"} == plans

    trained = load_trained(whole, "cpu")
    assert trained.model.attention == (SLIDING, FULL)
    assert trained.model.model.layers[1].self_attn.k_conv.weight.abs().min() > 0
    stage_end = whole / "checkpoints" / "tokens_000000000002560"
    assert load_trained(stage_end, "cpu").model.attention == (SLIDING, MOBA)
    generate.main([f"run={whole}", "prompt=the river", "max_new_tokens=5", "device=cpu"])
    assert capsys.readouterr().out
    with pytest.raises(SystemExit):
        export.main([f"run={whole}", f"to={house.root}/exported"])
    message = capsys.readouterr().err
    assert all(word in message for word in ("model.key_conv=3", "model.rope_pattern=RN", "sliding windows"))
    assert not (house.root / "exported").exists()
