"""Runs the checks of tests/bench/PENDING.md that one GPU can do, each part in a process and a time limit of its own.

    python scripts/gpu_checks.py OUT [PART ...]

Logs, JUnit files and benchmark rows land under OUT; a part that fails or hangs costs its own result and nothing else.
Works from a checkout on a machine where headrace is importable, without Ray, MLflow and DALI; `predicted` needs Hydra.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
HEADRACE = [sys.executable, "-m", "headrace.platform.cli.main"]


def parts(out: Path) -> dict[str, tuple[float, list[str]]]:
    """Name of every part: seconds it may take, and its command."""
    # Only files that have such tests: others import Ray, Hydra and MLflow, which need not be there.
    files = sorted(str(path) for path in Path("tests").rglob("test_*.py") if "mark.gpu" in path.read_text())
    gpu_tests = ["-m", "gpu", *files, f"--junitxml={out / 'gpu-tests.xml'}", "--timeout=120"]
    predicted = ["experiment=qwen2_5_0_5b_32k_1xh200", "cluster=inline", "tracking=files", "checkpoint=none"]
    predicted += ["data.loader=memmap", "train.steps=10", f"run.dir={out / 'predicted'}"]
    packed_fio = Path("build/fio/fio")  # scripts/pack-fio, where the machine has none
    tiers = ["device=cuda", "limit_s=170", *([f"fio={packed_fio}"] if packed_fio.exists() else [])]
    return {
        "gpu-tests": (540, [*PYTEST, *gpu_tests]),
        "kernels": (560, [*HEADRACE, "bench", "kernels", "device=cuda", "limit_s=520", f"out={out / 'results'}"]),
        "tiers": (220, [*HEADRACE, "bench", "tiers", *tiers, f"out={out / 'results'}"]),
        "profile": (320, [*HEADRACE, "doctor", "--profile", f"out={out / 'profile'}"]),
        "headline": (540, [*HEADRACE, "bench", "gpu-headline", f"out={out / 'results'}"]),
        "predicted": (240, [*HEADRACE, "train", *predicted]),
        "doctor": (60, [*HEADRACE, "doctor", "--json"]),
    }


def main(argv: list[str]) -> int:
    """Run the named parts (all of them by default); 0 when each ended with exit code 0."""
    if not argv:
        print(__doc__, file=sys.stderr)
        return 2
    out = Path(argv[0])
    out.mkdir(parents=True, exist_ok=True)
    known = parts(out)
    unknown = [name for name in argv[1:] if name not in known]
    if unknown:
        print(f"no part {', '.join(unknown)}; known: {', '.join(known)}", file=sys.stderr)
        return 2
    codes: dict[str, int | str] = {}
    for name in argv[1:] or known:
        limit_s, command = known[name]
        begin_s = time.monotonic()
        with (out / f"{name}.log").open("w") as log:
            try:
                environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
                done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, timeout=limit_s, env=environment)
                codes[name] = done.returncode
            except subprocess.TimeoutExpired:
                codes[name] = f"stopped after {limit_s:.0f} s"
        print(f"{name}: {codes[name]} in {time.monotonic() - begin_s:.0f} s", flush=True)
        (out / "parts.json").write_text(json.dumps(codes, indent=2))
    return 0 if all(code == 0 for code in codes.values()) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
