"""Plan files: what is written comes back, whoever wrote it, and every mistake names file, key and value."""

import json
import re

import pytest
import yaml

from moba.kinds import Full, Moba, Sliding
from moba.kinds.plan_file import names_a_file, read_plan, write_plan

PLAN = (Moba(64, 4, first_blocks=1), Full(), Moba(128, 3))


def test_what_is_written_comes_back(tmp_path):
    """Catches entries that lose first_blocks, comments or measurements that break the file, and one that is half
    written."""
    path = tmp_path / "new" / "plan.yaml"
    write_plan(path, PLAN, {"budget": 0.25, "note": "a: b # c", "layers": [{"regret": 1e-3}, None]})
    assert read_plan(path) == read_plan(str(path), 3) == PLAN
    text = path.read_text()
    assert text.startswith("#") and "- [moba, 64, 4, 1]\n- [full, null, null]\n- [moba, 128, 3]\n" in text
    assert yaml.safe_load(text)["measured"] == {"budget": 0.25, "note": "a: b # c", "layers": [{"regret": 1e-3}, None]}
    assert [file.name for file in path.parent.iterdir()] == ["plan.yaml"]
    with pytest.raises(ValueError, match="sliding 8"):
        write_plan(path, (Sliding(8),), {})
    assert path.read_text() == text


def test_json_and_files_by_hand(tmp_path):
    """Catches a reader of its own writer's files alone: the "moba" section's plan of a config.json is one."""
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({"plan": [["moba", 64, 4, 1], ["full", None, None], ["moba", 128, 3]]}))
    assert read_plan(path) == PLAN
    assert names_a_file("a/b.YAML") and names_a_file(str(path)) and not names_a_file("512x3+1")


@pytest.mark.parametrize(
    "content,words",
    [
        (None, "No such file.*tune_attention"),
        ("plan: [", "is not YAML"),
        ("a plan", "no key plan"),
        ("plan: 3", "plan=3: needs a list"),
        ("plan: []", r"plan=\[\]: needs a list"),
        ("plan: [[full, null, null]]\nlayers: 1", "unknown key layers"),
        ("plan: [[full, null, null], full]", r"plan\[1\]='full': needs"),
        ("plan: [[[moba], 8, 3]]", r"plan\[0\]=.*needs"),
        ("plan: [[]]", r"plan\[0\]=\[\]: needs"),
        ("plan: [[mobo, 8, 3]]", r"plan\[0\]=.*kind='mobo': choose one of moba"),
        ("plan: [[moba, 8, 1, 1]]", r"plan\[0\]=.*first_blocks=1: must be less than top_k=1"),
        ("plan: [[moba, 8, '3']]", r"plan\[0\]=.*top_k='3'"),
        ("plan: [[moba, 8K, 3]]", r"plan\[0\]=.*block_size='8K'"),
        ("plan: [[full, 8, 3]]", r"plan\[0\]=.*\[full, null, null\]"),
        ("plan: [[full, null, null]]", "plan has 1 entries for a model of 2 layers"),
        (b"plan: \xff", "is not YAML"),
    ],
)
def test_mistakes_name_file_key_and_value(tmp_path, content, words):
    """Catches a traceback, and sizes of full attention that would be ignored."""
    path = tmp_path / "plan.yaml"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError) as error:
        read_plan(path, 2)
    message = str(error.value)
    assert re.search(f"^{re.escape(str(path))}: .*{words}", message) and "\n" not in message, message
