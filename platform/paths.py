"""Where the project's own files are, in a checkout and in a wheel alike."""

from __future__ import annotations

from pathlib import Path

# `conf/` and `platform/` are neighbours in both forms. An absolute path on purpose: Hydra's module-relative search
# fails in a namespace package.
CONF_DIR = Path(__file__).resolve().parents[1] / "conf"
# Of measurements, below the working folder; git ignores it.
RESULTS_DIR = Path("bench_results")
