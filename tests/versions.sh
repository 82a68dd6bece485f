#!/usr/bin/env bash
# Runs the short tests with the lowest torch and transformers that pyproject.toml allows, and with the highest, each in a
# fresh virtual environment: `tests/versions.sh` for both, `tests/versions.sh lowest` for one. Needs a package index and
# some 6 GB of disk space, since older wheels of torch bring CUDA. The extra `dev` is not used, as its triton fits the
# highest torch alone.
set -euo pipefail
cd "$(dirname "$0")/.."

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
tests=(
  tests/moba tests/train/test_{model,layer_patterns,rope,loss,fused_loss,optim,step,generation,hf,hf_metadata,checkpoint}.py
  tests/launch/test_{export,init_source}.py
)
# In the interpreter of triton 3.6, which comes with torch 2.11, kernels fail with numpy 2.4.
lowest=$(python3 - <<'PYTHON'
import re, tomllib

declared = tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"]
bounds = dict(re.match(r"([\w-]+)>=(\d+(?:\.\d+)?)", line).groups() for line in declared)
print(*(f"{name}=={bounds[name]}.*" for name in ("torch", "transformers")), "numpy<2.4")
PYTHON
)
declare -A pins=([lowest]="$lowest" [highest]="")

failed=0
[ $# -gt 0 ] || set -- lowest highest
for name in "$@"; do
  python3 -m venv "$work/$name"
  # shellcheck disable=SC2086  # a list
  "$work/$name/bin/pip" install --quiet -e . ${pins[$name]} pytest pytest-timeout hypothesis psutil
  "$work/$name/bin/python" -c "
import numpy, torch, transformers
print('$name: torch', torch.__version__, 'transformers', transformers.__version__, 'numpy', numpy.__version__, flush=True)"
  PYTHONPATH=$PWD "$work/$name/bin/python" -m pytest "${tests[@]}" || failed=1
  rm -r "${work:?}/$name"
done
exit $failed
