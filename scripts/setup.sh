#!/usr/bin/env bash
# Makes the virtual environment named by $1 from the lock. Called by `make setup`, from the repository root.
set -euo pipefail

venv=${1:?folder of the virtual environment}
python=${PYTHON:-python3}

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "headrace needs Python 3.11 or newer; $python is $("$python" --version 2>&1). Set PYTHON=python3.12, say." >&2
    exit 2
}
echo "setting up $venv (once; about a minute when the packages are at hand) ..."
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }
locked_torch=$(sed -n 's/^torch==//p' requirements.lock)

# torch first and alone: a resolver that meets it as somebody's dependency may choose another build.
pip install -q "torch==$locked_torch"
pip install -q -r requirements.lock
if [ -e /proc/driver/nvidia/version ] || command -v nvidia-smi >/dev/null 2>&1; then
    # --no-deps: KvikIO's metadata wants CuPy, which it runs without; the CUDA libraries came with torch.
    pip install -q --no-deps -r requirements-gds.lock
fi
# torch's CUDA builds bring the Triton they were made with; beside a CPU build it is for the tests of our kernels.
if ! "$venv/bin/python" -c 'import importlib.metadata as m, re, sys
sys.exit(not any(re.match("triton", need) for need in m.requires("torch") or []))'; then
    pip install -q -r requirements-triton.lock
fi
pip install -q --no-deps --no-build-isolation -e .

"$venv/bin/python" - "$locked_torch" <<'PY'
import importlib.metadata
import sys

got = importlib.metadata.version("torch").split("+")[0]
if got != sys.argv[1]:
    sys.exit(f"setup: torch {got} was installed, the lock says {sys.argv[1]}: remove .venv and run `make setup` again")
PY
