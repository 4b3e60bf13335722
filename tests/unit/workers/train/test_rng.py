"""Every generator goes on where it was."""

from __future__ import annotations

import json
import random
from typing import Any

import numpy as np
import pytest
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


def test_a_saved_state_continues_all_streams() -> None:
    seed_everything(3, rank=0)
    draw()  # an odd number of normals: python and numpy keep the second of a pair
    saved = json.dumps(rng_state(CPU))
    expected = [draw() for _ in range(3)]
    seed_everything(99, rank=0)
    restore_rng_state(json.loads(saved), CPU)
    assert [draw() for _ in range(3)] == expected


def test_ranks_and_seeds_differ_and_repeat() -> None:
    seen = []
    for seed, rank in ((0, 0), (0, 1), (1, 0), (0, 0)):
        seed_everything(seed, rank)
        seen.append(draw())
    assert seen[0] == seen[3]
    assert all(seen[0][i] != seen[1][i] and seen[0][i] != seen[2][i] for i in range(5))


@pytest.mark.parametrize(
    "wrong",
    [
        None,
        [],
        {},
        {"python": [3, [1, 2], None]},
        {"python": [3, ["x"] * 625, None]},
        {"numpy": ["MT19937", [1] * 624, 625, 0, 0.0]},  # numpy itself would read beyond its table
        {"numpy": ["MT19937", [1] * 624, -1, 0, 0.0]},
        {"numpy": ["MT19937", [2**40] * 624, 1, 0, 0.0]},
        {"numpy": ["PCG64", [1] * 624, 1, 0, 0.0]},
        {"torch": "zz"},
        {"torch": ""},
        {"torch": "00" * 5056},
        {"torch": 7},
    ],
)
def test_a_state_that_is_none_is_refused(wrong: Any) -> None:
    state = {**rng_state(CPU), **wrong} if isinstance(wrong, dict) and wrong else wrong
    with pytest.raises(ValueError, match="not the state of random generators"):
        restore_rng_state(state, CPU)
