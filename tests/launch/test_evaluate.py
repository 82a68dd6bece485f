"""launch/evaluate.py in several processes, on a run that the real command made."""

import json

from launch_runs import END, ROOT

SCRIPT = ROOT / "launch" / "evaluate.py"


def test_two_processes_give_the_bits_of_one(launcher, whole, house, tmp_path):
    """Catches documents that are counted twice or not at all, sums that depend on who adds what, and a command that
    does not run under torchrun: 3 documents, the other cohort, other buckets and clusters, 1 and 2 processes."""
    arguments = [f"run={whole}", "device=cpu", "documents=3", "cohort=available", "seq_len=256", "bucket=64"]
    arguments += ["cluster=.", "attention=16x2"]
    one = launcher.run([*arguments, f"to={tmp_path / 'one'}"], script=SCRIPT)
    two = launcher.run_ranks([*arguments, f"to={tmp_path / 'two'}"], 2, script=SCRIPT)
    assert [ended.code for ended in (one, *two)] == [0, 0, 0], (one, *two)
    assert "wrote" in two[0].out and two[1].out == ""
    name = f"position_loss_{END:015d}_256_16x2_available"
    assert (tmp_path / "one" / f"{name}.npz").read_bytes() == (tmp_path / "two" / f"{name}.npz").read_bytes()
    records = [json.loads((tmp_path / folder / f"{name}.json").read_text()) for folder in ("one", "two")]
    assert [record["num_processes"] for record in records] == [1, 2] and records[0]["mean"] == records[1]["mean"]
    for record in records:
        assert record["dense_up_to"] == 32 and record["config"]["eval"]["documents"] == 3 and record["device"] == "cpu"
        assert record["num_documents"] == 3 and record["edges"] == [0, 64, 128, 192, 256]
        # Ids are file names, of which any two begin differently or alike; the bits would differ with another grouping.
        assert record["num_clusters"] == len({document["id"][0] for document in record["documents"]})
    refused = launcher.run_ranks([f"run={tmp_path}"], 2, script=SCRIPT)
    assert refused[0].code == 2 and refused[0].err.count("error: ") == 1 and "error: " not in refused[1].err
