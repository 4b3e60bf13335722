"""Plans of auto for ranks of pipelines, against the peak that their own action list has."""

from __future__ import annotations

from dataclasses import replace

import pytest

from headrace.helpers.planning import FOUR_KEYS
from headrace.platform.planning.hardware import DeviceClass, HardwareProfile
from headrace.platform.planning.presets import asked_plan
from headrace.platform.planning.priced import wanted_bytes
from headrace.platform.planning.request import PlanRequest
from headrace.platform.planning.simulate.stages import stage_requests
from headrace.platform.planning.solve import find_plan
from headrace.storage.core.records import Medium
from headrace.workers.memory.config import MemoryPreset
from headrace.workers.parallel.config import INTERLEAVED, ONE_F_ONE_B, V_HALF, ZBV, Vocabulary
from headrace.workers.parallel.pipeline.actions import Pipeline


@pytest.mark.parametrize(
    "pipeline",
    [
        Pipeline(ONE_F_ONE_B, 2, 4),
        Pipeline(INTERLEAVED, 2, 4, 2),
        Pipeline(ZBV, 2, 4, 2, Vocabulary.vocab_2),
        Pipeline(V_HALF, 2, 4, 2),
    ],
)
def test_auto_fits_wherever_recompute_does_and_keeps_what_it_can(pipeline: Pipeline) -> None:
    """At the very bytes of recompute, halfway to those of keep, and at the bytes of keep."""
    asked = PlanRequest(
        model=replace(FOUR_KEYS, num_layers=8),
        seq_len=512,
        profile=HardwareProfile(name="test", device_class=DeviceClass.cpu),
        micro_batches=4,
        head_groups=1,
        host_budget_bytes=0,
        ssd_budget_bytes=0,
    )
    for own in stage_requests(pipeline, asked):
        low, high = (
            wanted_bytes(asked_plan(each), each)[Medium.hbm]
            for each in (replace(own, preset=preset) for preset in (MemoryPreset.recompute, MemoryPreset.keep))
        )
        assert low < high
        reruns = []
        for budget in (low, (low + high) // 2, high):
            asked = replace(own, preset=MemoryPreset.auto, device_budget_bytes=budget)
            plan = find_plan(asked)
            assert plan is not None
            assert wanted_bytes(plan, asked)[Medium.hbm] <= budget
            reruns.append(sum(block.rerun_flops for block in asked.blocks(plan)))
        assert reruns == sorted(reruns, reverse=True)
        assert reruns[1] < reruns[0] or high < 1.1 * low  # the queue takes more than keep holds
        assert find_plan(replace(own, preset=MemoryPreset.auto, device_budget_bytes=low // 2)) is None
