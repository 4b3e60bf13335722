from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from headrace.workers.train.allocator import OLD_VARIABLE, VARIABLE, set_allocator


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {VARIABLE: "expandable_segments:True"}),
        ({VARIABLE: "max_split_size_mb:64"}, {VARIABLE: "max_split_size_mb:64,expandable_segments:True"}),
        ({OLD_VARIABLE: "max_split_size_mb:64"}, {OLD_VARIABLE: "max_split_size_mb:64,expandable_segments:True"}),
        ({VARIABLE: "expandable_segments:False"}, {VARIABLE: "expandable_segments:False"}),
        ({VARIABLE: "backend:cudaMallocAsync"}, {VARIABLE: "backend:cudaMallocAsync"}),
    ],
)
def test_segments_grow_unless_the_user_says_otherwise(given: dict[str, str], expected: dict[str, str]) -> None:
    environ = dict(given)
    for _ in range(2):
        set_allocator(environ)
        assert environ == expected


# In place of torch: tells what the variable says as it is imported, and ends the process.
IN_PLACE_OF_TORCH = f"""\
import os
os.write(1, os.environ.get("{VARIABLE}", "nothing").encode())
os._exit(0)
"""
# A rank's shell needs of its job no more than this before it imports torch.
START_A_RANK = """\
import sys, time, types
from headrace.workers.actors import rank
from headrace.workers.job import RankContext
host = types.SimpleNamespace(memory_grows=False)
job = types.SimpleNamespace(run_dir=sys.argv[1], tiers=types.SimpleNamespace(host=host))
rank.redirect_output = lambda path, title: None
rank.RankShell(0).start(job, RankContext(device="cuda"))
time.sleep(60)
"""


@pytest.mark.parametrize(
    "command",
    [["-c", START_A_RANK], ["-m", "headrace.bench.gpu_case", "{}"]],
    ids=["rank", "gpu_case"],
)
def test_it_is_set_before_torch_is_imported(command: list[str], tmp_path: Path, repo_root: Path) -> None:
    """Both ways to train on a GPU: the shell of a rank, and a case of the headline benchmark."""
    (tmp_path / "torch.py").write_text(IN_PLACE_OF_TORCH)
    environ = {name: value for name, value in os.environ.items() if name not in (VARIABLE, OLD_VARIABLE)}
    environ["PYTHONPATH"] = f"{tmp_path}:{repo_root}"
    words = [sys.executable, *command, str(tmp_path)]
    told = subprocess.run(words, env=environ, capture_output=True, text=True, check=True)
    assert told.stdout == "expandable_segments:True", told.stderr
