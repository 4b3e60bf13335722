from __future__ import annotations

import pytest

from headrace.platform.tracking.aggregate import RULES, Rule, aggregate
from headrace.workers.telemetry import names

PER_GPU = {
    names.TOKENS_PER_S_PER_GPU,
    names.MFU_CAUSAL_PCT,
    names.MFU_FULL_ATTENTION_PCT,
    names.HFU_PCT,
    names.MFU_PEAK_TFLOPS,
    names.D2H_GBPS,
    names.H2D_GBPS,
    names.SSD_WRITE_GBPS,
    names.SSD_READ_GBPS,
}


def test_every_rule_by_hand() -> None:
    ranks = {
        1: {names.LOSS_TRAIN: 9.0, names.STEP_S: 3.0, names.HOST_STORED_GIB: 2.0, names.MFU_CAUSAL_PCT: 30.0},
        0: {names.LOSS_TRAIN: 4.0, names.STEP_S: 2.0, names.HOST_STORED_GIB: 1.0, names.MFU_CAUSAL_PCT: 40.0},
        2: {names.STEP_S: 1.0, names.STEP_ERROR_PCT: -7.0, names.GPU_PEAK_GIB: 5.0},
    }
    ranks[0][names.STEP_ERROR_PCT] = 3.0
    ranks[0][names.GPU_PEAK_GIB] = 6.0
    assert aggregate(ranks) == {
        names.LOSS_TRAIN: 4.0,
        names.STEP_S: 3.0,
        names.HOST_STORED_GIB: 3.0,
        names.MFU_CAUSAL_PCT: 35.0,
        names.STEP_ERROR_PCT: -7.0,
        names.GPU_PEAK_GIB: 6.0,
    }


def test_every_metric_name_has_a_rule_or_is_a_rate_per_gpu() -> None:
    known = {value for key, value in vars(names).items() if key.isupper() and isinstance(value, str)}
    assert known - set(RULES) - PER_GPU == set(), "say in aggregate.py how ranks become one value"
    assert {name for name, rule in RULES.items() if rule is Rule.total} == {
        name for name in known if name.endswith(("_stored_gib", "_loaded_gib", "_sent_gib"))
    }


@pytest.mark.parametrize("name", sorted(RULES))
def test_one_rank_stays_what_it_said(name: str) -> None:
    assert aggregate({3: {name: 1.25}}) == {name: 1.25}
