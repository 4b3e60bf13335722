from __future__ import annotations

import subprocess
import sys

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


def test_it_is_set_before_torch_is_there() -> None:
    """A rank's shell sets it, and neither of them imports torch."""
    code = "import sys, headrace.workers.actors.rank\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
