"""Every generator goes on where it was."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import torch

from headrace.workers.train.rng import restore_rng_state, rng_state, seed_everything

CPU = torch.device("cpu")


def draw() -> list[float]:
    return [
        random.random(),
        random.gauss(0, 1),
        float(np.random.rand()),
        float(np.random.randn()),
        float(torch.rand(())),
    ]


def test_a_saved_state_continues_all_streams(tmp_path: Path) -> None:
    seed_everything(3, rank=0)
    draw()  # an odd number of normals: python and numpy keep the second of a pair
    torch.save(rng_state(CPU), tmp_path / "rng.pt")
    expected = [draw() for _ in range(3)]
    seed_everything(99, rank=0)
    restore_rng_state(torch.load(tmp_path / "rng.pt", weights_only=True), CPU)
    assert [draw() for _ in range(3)] == expected


def test_ranks_and_seeds_differ_and_repeat() -> None:
    seen = []
    for seed, rank in ((0, 0), (0, 1), (1, 0), (0, 0)):
        seed_everything(seed, rank)
        seen.append(draw())
    assert seen[0] == seen[3]
    assert all(seen[0][i] != seen[1][i] and seen[0][i] != seen[2][i] for i in range(5))
