"""What a run tells torch's libraries through the environment."""

import os
import subprocess
import sys

import pytest

NAMES = {"OMP_WAIT_POLICY": "passive", "TORCH_NCCL_DUMP_ON_TIMEOUT": "0"}
SCRIPT = """
import os, sys
found = []
class Reader:
    def find_spec(self, name, *_):
        if name == "torch":
            found.append(dict(os.environ))
sys.meta_path.insert(0, Reader())
import train.engine.world
print(*(found[0][name] for name in sys.argv[1:]))
"""


@pytest.mark.parametrize("given", [{}, {"OMP_WAIT_POLICY": "active", "TORCH_NCCL_DUMP_ON_TIMEOUT": "1"}])
def test_the_environment_is_set_before_torch_is_imported_unless_the_user_did(given):
    """Catches a variable that comes too late for torch's libraries, and one that overrides the user's."""
    clean = {key: value for key, value in os.environ.items() if key not in NAMES}
    command = [sys.executable, "-c", SCRIPT, *NAMES]
    done = subprocess.run(command, env=clean | given, capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.split() == list((NAMES | given).values())
