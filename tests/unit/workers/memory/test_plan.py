from __future__ import annotations

import json

import pytest

from headrace.storage.core.errors import InputError
from headrace.storage.core.records import Medium
from headrace.workers.memory.config import MemoryPreset
from headrace.workers.memory.plan import LayerPlan, MemoryPlan, Residence, planned_transfer_bytes, preset_plan

HOST, SSD = (LayerPlan(r, Residence.recompute) for r in (Residence.host, Residence.ssd))


def test_json_round_trip() -> None:
    plan = MemoryPlan("auto", (HOST, SSD, LayerPlan()), prefetch_layers=3, predicted={"mem/gpu_peak_gib": 1.5})
    assert MemoryPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


def test_layers_that_make_no_sense() -> None:
    for layer_input, rest in ((Residence.recompute, Residence.recompute), (Residence.host, Residence.hbm)):
        with pytest.raises(ValueError, match="layer"):
            LayerPlan(layer_input, rest)
    with pytest.raises(ValueError, match="not supported"):
        LayerPlan(Residence.hbm, Residence.ssd)


def test_transfer_formula() -> None:
    plan = MemoryPlan("mixed", (HOST, SSD, HOST, LayerPlan()))
    assert planned_transfer_bytes(plan, 100, 3) == {Medium.host: 600, Medium.ssd: 300}
    assert planned_transfer_bytes(plan, [1, 10, 100, 1000]) == {Medium.host: 101, Medium.ssd: 10}
    with pytest.raises(ValueError, match="2 layer input sizes"):
        planned_transfer_bytes(plan, [1, 2])


def test_every_preset_but_auto_is_uniform() -> None:
    for preset in MemoryPreset:
        if preset is MemoryPreset.auto:
            with pytest.raises(InputError):
                preset_plan(preset, 2)
        else:
            assert len(set(preset_plan(preset, 5, 2).layers)) == 1
    assert preset_plan("checkpoint", 3).layers == preset_plan("recompute", 3).layers
