from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from headrace.helpers.training import FOREIGN_HOST, FOREIGN_KEEP
from headrace.platform.tracking.run_folder import write_json
from headrace.storage.core.json_lines import JsonLines
from headrace.storage.core.records import Direction, Medium, TransferRecord
from headrace.storage.transfer_log import TransferLog
from headrace.workers.memory.plan import MemoryPlan
from headrace.workers.telemetry import names

MIB = 1024**2


def step_line(step: int) -> dict[str, Any]:
    return {
        "step": step,
        "loss": 8.0 / step,
        names.LOSS_TRAIN: 8.0 / step,
        names.STEP_S: 2.0,
        names.EXPOSED_PCT: 5.0,
        names.DATA_WAIT_S: 0.01,
        names.MFU_CAUSAL_PCT: 30.0,
        names.MFU_FULL_ATTENTION_PCT: 40.0,
        names.HFU_PCT: 35.0,
        names.TOKENS_PER_S_PER_GPU: 1000.0,
        names.LEARNING_RATE: 1e-3,
        names.GRAD_NORM: 2.0,
        names.GPU_PEAK_GIB: 0.5,
        names.HOST_PEAK_GIB: 0.25,
        names.HOST_STORED_GIB: 0.25,
        names.of_tensor(names.HOST_TENSOR_GIB, "out+lse"): 0.125,
        names.of_tensor(names.SSD_TENSOR_GIB, "x"): 0.0625,
        "unix_s": 1.7e9 + step,
        "num_ranks": 1,
    }


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """A run folder of so many steps; `moves` also writes a transfer log of one host and one SSD block a step."""

    def make(num_steps: int, *, moves: bool = True) -> Path:
        folder = tmp_path / "a run"
        lines = JsonLines(folder / "metrics.jsonl")
        for step in range(1, num_steps + 1):
            lines.append(step_line(step))
        lines.close()
        (folder / "config.yaml").write_text("name: <script>alert(1)</script> & grün\n", encoding="utf-8")
        layers = (FOREIGN_HOST,) * 3 + (FOREIGN_KEEP,)
        plan = MemoryPlan("auto", layers, predicted={names.GPU_PEAK_GIB: 0.4, names.STEP_S: 2.0})
        write_json(folder / "plan.json", plan.to_dict())
        if moves:
            log = TransferLog(0)
            for step in range(num_steps):
                for layer, tier in enumerate((Medium.host, Medium.ssd)):
                    key, at = f"s{step}.m0.l{layer}.layer_input.c0", 2.0 * step + 0.1 * layer
                    for direction, when in ((Direction.store, at), (Direction.load, at + 1.0)):
                        log.append(TransferRecord(key, MIB, tier, direction, when, when, when + 0.05))
            log.write_parquet(folder / "transfers.parquet")
        return folder

    return make
