"""A rank is killed in stage 2 of a step, and the owners of the slabs live on: the next group goes on from there."""

from __future__ import annotations

import os
import signal
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from headrace.helpers.training import run_distributed, run_recorded, tiny_leases
from headrace.platform.control.states import Outcome
from headrace.workers.memory.config import MemoryPreset
from headrace.workers.memory.plan import Residence, Stretch
from headrace.workers.memory.presets import Choices, preset_plan
from headrace.workers.model.skeleton import dense_skeleton
from headrace.workers.telemetry import names
from headrace.workers.train.config import CheckpointConfig
from headrace.workers.train.record_files import RecordDamaged, RecordFiles
from headrace.workers.train.session import rank_folder

NUM_RANKS, NUM_CHUNKS = 2, 8  # rows of 32 tokens


def chunk_done(run_dir: str) -> int:
    """Chunks of stage 2 in the newest record of rank 1, if it is one of the second step."""
    files = RecordFiles(rank_folder(Path(run_dir), 1))
    try:
        record = files.read(max(files.numbers()))
    except (RecordDamaged, ValueError):  # it is removed at this moment, or there is none
        return 0
    return record.body["pass"]["num_done"] if record.body["step"] == 1 and record.body["pass"] else 0


def test_a_killed_rank_goes_on_after_its_last_chunk(job, start, tmp_path: Path) -> None:
    made = job(
        checkpoint=CheckpointConfig(every=1, every_chunks=1, at_end=False), train={"steps": 2, "micro_batches": 1}
    )
    choices = Choices(seq_len=32, chunk_size=32 // NUM_CHUNKS)
    plan = preset_plan(MemoryPreset.chunk_ssd, [dense_skeleton(made.model)] * made.model.num_layers, choices=choices)
    made = replace(made, plan=replace(plan, kv_grads=(Stretch(0, None, Residence.host),)))
    killed: list[int] = []
    over = threading.Event()

    def kill(run: Any) -> None:
        while not over.is_set() and chunk_done(made.run_dir) < 2:
            time.sleep(0.001)
        killed.append(run.pid(1))
        os.kill(killed[0], signal.SIGKILL)

    def meddle(run: Any, found: Any) -> None:
        if getattr(found, "kind", "") == "group_started" and found.facts["attempt"] == 0:
            threading.Thread(target=kill, args=(run,), daemon=True).start()

    try:
        run = start(made, "ray", num_workers=NUM_RANKS, meddle=meddle)
    finally:
        over.set()
    assert run.outcome.outcome is Outcome.finished
    assert run.outcome.restarts == len(killed) == 1
    said = {event.kind: event.text for report in run.reports for event in report.events}
    assert "step 2 goes on in micro-batch" in said["step_resumed"]
    assert "step_restarted" not in said
    whole = replace(made, run_dir=f"{made.run_dir}-whole")
    with tiny_leases(tmp_path, num_ranks=NUM_RANKS) as leases:
        ranks = run_distributed(partial(run_recorded, whole), NUM_RANKS, leases=leases)
    keys = (names.LOSS_TRAIN, names.GRAD_NORM)
    wanted = {(r.step, r.rank): tuple(r.metrics[key] for key in keys) for each in ranks for r in each.reports}
    assert run.curve == wanted
    assert not list(Path(made.run_dir).glob("ranks/*/record-*"))
