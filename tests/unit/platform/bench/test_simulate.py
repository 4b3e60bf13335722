"""`headrace bench simulate`: the fit, and rows that scale as they must."""

from __future__ import annotations

from dataclasses import replace

from headrace.bench import simulate
from headrace.bench.systems import SYSTEMS, degrees
from headrace.helpers.tiny_models import LLAMA

MODEL = replace(LLAMA, vocab_size=64, hidden_size=64, num_layers=2, num_heads=32, num_kv_heads=8, intermediate_size=64)


def test_rows_of_every_system() -> None:
    rows = list(simulate.run({**simulate.OPTIONS, "lengths": "131072,262144", "gpus": "8,1024"}))
    fits, predictions = rows[:2], {row.name: row.numbers for row in rows[2:]}
    assert all(row.target is not None and row.target.met for row in fits)
    assert len(predictions) == 4 * len(SYSTEMS)
    for name in SYSTEMS:
        for num_gpus in (8, 1024):
            short, long = (predictions[f"{name} {length} tokens {num_gpus} GPUs"] for length in (131072, 262144))
            assert short["step_s"] < long["step_s"]
    # What MEMO does not run again is a quarter of ALST's work, and both are nearly all compute here.
    memo, alst = (predictions[f"{name} 262144 tokens 8 GPUs"] for name in ("memo", "alst"))
    assert 0.7 < memo["step_s"] / alst["step_s"] < 0.9


def test_degrees_make_up_the_gpus() -> None:
    for system in SYSTEMS.values():
        for num_gpus in (1, 8, 32, 1024):
            dims = degrees(system, MODEL, num_gpus)
            assert dims.world_size == num_gpus
            assert MODEL.num_kv_heads % dims.tensor == MODEL.num_heads % (dims.tensor * dims.ulysses) == 0
