"""Families of transformers models: what the script finds in some, and what the page says of all."""

import json
import re
from pathlib import Path

import pytest
import torch
import transformers_families as families

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("family", ["gpt2", "qwen3_next", "deepseek_v3", "gemma4_unified", "got_ocr2", "blenderbot"])
def test_families_that_were_right_stay_right(family):
    """Catches a refusal of what can be computed: convolved and recurrent layers beside attention, values narrower than
    keys, models that hold others of images, decoders with another number of layers than encoders."""
    result = families.measure(family)
    assert result["outcome"] == "right", result
    assert {"loaded", "configured", "sparse"} <= {
        name for name, (found, _) in result["checks"].items() if found == "right"
    }


@pytest.mark.parametrize("family", ["bloom", "git", "deepseek_v32", "gpt_oss", "zamba", "rwkv"])
def test_families_that_cannot_be_right_are_refused(family):
    """Catches a model of another kind of attention that runs as something else, or fails with what says nothing."""
    result = families.measure(family)
    assert result["outcome"] == "refused", result
    assert all(found == "refused" and "moba" in text for found, text in result["checks"].values())


def test_a_wrong_model_is_called_wrong(monkeypatch):
    """Catches a comparison that passes whatever it is given."""
    attend = families.moba.transformers.attend

    def without_the_first_key(q, k, v, *args, **options):
        return attend(q, torch.cat([k[1:2], k[1:]]), v, *args, **options)

    monkeypatch.setattr(families.moba.transformers, "attend", without_the_first_key)
    assert families.measure("llama")["outcome"] == "WRONG"


def test_the_page_says_what_was_measured():
    """Catches a table that is older than the results, and an outcome that nobody looked at."""
    results = json.loads((ROOT / "docs/results/transformers_families.json").read_text())
    outcomes = [one["outcome"] for one in results.values()]
    assert set(outcomes) == {"right", "refused", "not built"} and len(results) >= 190
    page = (ROOT / "docs/transformers.md").read_text().partition(families.MARK)[2]
    assert f"{outcomes.count('right')} right, {outcomes.count('refused')} refused" in page
    assert re.findall(r"^\| (\S+) \| (right|refused|not built) ", page, flags=re.MULTILINE) == [
        (name, one["outcome"]) for name, one in results.items()
    ]
