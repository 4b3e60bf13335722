"""The planner's acceptance: the benchmark's rows, and random configurations that fit or do not."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import replace

import pytest
import torch

from headrace.bench import plan_check
from headrace.bench.plan_check import RIVALS, Measured, measure, ready_decoder, tokens_of, with_budgets
from headrace.helpers.planning import FOUR_KEYS
from headrace.platform.planning import priced
from headrace.platform.planning.hardware import DeviceClass, HardwareProfile
from headrace.platform.planning.presets import asked_plan
from headrace.platform.planning.refuse import fits
from headrace.platform.planning.request import PlanRequest
from headrace.platform.planning.solve import find_plan
from headrace.storage.core.errors import InputError
from headrace.storage.core.records import Medium
from headrace.workers.memory.config import MemoryPreset
from headrace.workers.model.config import Family, ModelConfig

RATES = {"fp32_tflops": 0.05, "d2h_gbps": 5.0, "h2d_gbps": 5.0, "ssd_write_gbps": 1.0, "ssd_read_gbps": 1.0}
CPU = HardwareProfile(name="cpu", device_class=DeviceClass.cpu, **RATES)
OPTIONS = {**plan_check.OPTIONS, "model": "tiny", "vocab_size": 64, "rounds": 1}
MARGIN = 0.05
# Loads ahead of a block are counted whole, and start one after another: of ssdtrain, which moves the most, the
# prediction for a small model is up to 17 % above what is live.
JUDGED = [preset for preset in RIVALS if preset is not MemoryPreset.ssdtrain]


@pytest.fixture(autouse=True)
def stated_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_check, "measured_profile", lambda: CPU)


def test_rows_of_a_tiny_model() -> None:
    threads = torch.get_num_threads()
    rows = list(plan_check.run({**OPTIONS, "lengths": "256,512", "settings": "roomy,chunk_ssd", "most_rivals": 1}))
    *checked, last = rows
    assert [row.error for row in rows] == [None] * 3
    assert torch.get_num_threads() == threads
    for row in checked:
        peaks = {name: value for name, value in row.numbers.items() if name.endswith("peak_error_pct")}
        assert peaks
        # Attention and MLP of a chunk count together; in so small a model, of a chunk of 128 tokens, that is seen.
        assert max(map(abs, peaks.values())) <= (5.0 if "chunk" in row.name else 2.0), row
        assert row.numbers["bytes_exact"] == 1, row
        assert row.numbers["seconds_over_recompute"] > 0
    assert checked[1].numbers["chunk_ssd_ssd_peak_mib"] > 0
    assert last.numbers["num_configurations"] == 2


@pytest.mark.parametrize(
    ("name", "wrong", "said"),
    [
        ("wanted_bytes", lambda found: {tier: 33 * value // 32 for tier, value in found.items()}, "NOT peaks within"),
        ("work_of", lambda found: replace(found, load_host=found.load_host + 1), "NOT bytes moved exact"),
    ],
)
def test_a_wrong_prediction_is_a_target_not_met(name: str, wrong, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = getattr(priced, name)
    monkeypatch.setattr(priced, name, lambda plan, request: wrong(right(plan, request)))
    row = next(plan_check.run({**OPTIONS, "lengths": "256", "settings": "memo", "most_rivals": 0}))
    assert not row.target.met
    assert said in row.target.text


def test_wrong_options_are_named() -> None:
    with pytest.raises(InputError, match="settings=rumy: one of"):
        next(plan_check.run({**OPTIONS, "settings": "rumy"}))
    with pytest.raises(InputError, match="rounds=0"):
        next(plan_check.run({**OPTIONS, "rounds": 0}))


@pytest.mark.parametrize("preset", ["chunk_host", "chunk_ssd"])
def test_the_peak_of_the_sweep_by_chunk_counts_the_gradients_that_are_open(preset: str) -> None:
    """Of one layer; counted for all four, the peak would be 9 % too high."""
    model = replace(FOUR_KEYS, vocab_size=64, hidden_size=128, num_heads=4, num_kv_heads=2, intermediate_size=256)
    check_chunk_peak(PlanRequest(model=model, seq_len=768, profile=CPU, preset=MemoryPreset(preset), chunk_size=256))


def test_a_chunk_ends_with_both_gradients_of_a_tied_head_and_their_sum() -> None:
    """Counted otherwise, the peak would be 14 % too low."""
    model = replace(FOUR_KEYS, vocab_size=4096, num_layers=2, hidden_size=128, num_kv_heads=2, tie_embeddings=True)
    request = PlanRequest(model=model, seq_len=256, profile=CPU, preset=MemoryPreset.chunk, chunk_size=64)
    check_chunk_peak(request)


def check_chunk_peak(request: PlanRequest) -> None:
    plan = asked_plan(request)
    found = measure(plan, ready_decoder(request.model), tokens_of(request.model, request.seq_len)).peaks[Medium.hbm]
    assert 0.99 <= priced.wanted_bytes(plan, request)[Medium.hbm] / found <= 1.045


def random_model(draw: random.Random) -> ModelConfig:
    kv_heads = draw.choice([1, 2])
    return ModelConfig(
        name="random",
        family=draw.choice([Family.llama, Family.qwen2, Family.qwen3]),
        vocab_size=draw.choice([64, 300]),
        hidden_size=64 * draw.randint(1, 2),
        num_layers=draw.randint(2, 5),
        num_heads=kv_heads * draw.choice([1, 2, 4]),
        num_kv_heads=kv_heads,
        intermediate_size=32 * draw.randint(2, 8),
        tie_embeddings=draw.random() < 0.5,
    )


def holds(found: Measured, budgets: Mapping[Medium, int], factor: float) -> bool:
    return all(found.peaks[tier] <= factor * there for tier, there in budgets.items())


def answers(seed: int, num_presets: int) -> Iterator[tuple[bool, bool | None]]:
    """For random budgets of a random model: whether the planner says that it fits, and whether it does.

    None: within the margin. The truth is measured: of some presets, and of the solved plan.
    """
    draw = random.Random(seed)
    model, seq_len = random_model(draw), draw.choice([300, 512, 700])
    decoder, tokens = ready_decoder(model), tokens_of(model, seq_len)
    free = PlanRequest(model=model, seq_len=seq_len, profile=CPU, chunk_size=draw.choice([128, 200]))
    presets = draw.sample(JUDGED, num_presets)
    plans = {preset: asked_plan(replace(free, preset=preset)) for preset in presets}
    taken = {preset: measure(plan, decoder, tokens) for preset, plan in plans.items()}
    budgets = {Medium.hbm: int(draw.uniform(0.7, 1.3) * draw.choice(list(taken.values())).peaks[Medium.hbm])}
    for tier in (Medium.host, Medium.ssd):
        budgets[tier] = int(draw.uniform(0.5, 1.5) * max(found.peaks[tier] for found in taken.values()))
    asked = with_budgets(free, budgets)
    for preset in presets:
        own = asked_plan(replace(asked, preset=preset))
        if own != plans[preset]:  # some take what the budgets leave
            taken[preset] = measure(own, decoder, tokens)
        found = taken[preset]
        truth = True if holds(found, budgets, 1 - MARGIN) else None if holds(found, budgets, 1 + MARGIN) else False
        yield fits(replace(asked, preset=preset)), truth
    solved = find_plan(asked)
    assert fits(asked) == (solved is not None)
    if solved is not None:
        yield True, holds(measure(solved, decoder, tokens), budgets, 1 + MARGIN)
    else:
        yield False, any(holds(found, budgets, 1 - MARGIN) for found in taken.values())


def check_answers(seeds: range, num_presets: int) -> None:
    said = {True: 0, False: 0}
    for seed in seeds:
        for answer, truth in answers(seed, num_presets):
            assert truth is None or answer == truth, seed
            said[answer] += truth is not None
    assert min(said.values()) >= len(seeds)


def test_fits_and_does_not_fit_on_random_configurations() -> None:
    check_answers(range(6), 3)


@pytest.mark.soak
def test_fits_and_does_not_fit_on_fifty_random_configurations() -> None:
    check_answers(range(50), len(JUDGED))
