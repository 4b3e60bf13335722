"""A trace of single steps that opens in Perfetto: torch's operators and kernels, our blocks and our transfers.

torch.profiler records operators and, on a GPU, kernels and copies. Blocks and transfers have clocks of their own
(time.perf_counter), so their spans are added to the file: a mark around the step is in both clocks.
"""

from __future__ import annotations

import gzip
import json
import tempfile
import time
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from headrace.storage.core.outside import parse_json, read_regular
from headrace.storage.core.records import TransferRecord
from headrace.storage.transfer_log import TransferLog
from headrace.workers.train.timeline import Timeline

STEP_MARK = "headrace step"
MAX_TRACE_BYTES = 16 << 30  # before compression; a step has some hundred bytes for each operator
# Of the process that our spans belong to in the trace: no real one has it.
OUR_PID = "headrace"


class StepProfiler:
    """Writes `trace_stepN.json.gz` for single steps of one rank; the others run as without it.

    Args:
        steps: numbers of steps, from 1, as in metrics.jsonl.
        folder: where the files go.
        timeline / log: of the rank: when blocks computed and what moved.
    """

    def __init__(
        self, steps: Collection[int], folder: Path, timeline: Timeline, log: TransferLog, device: torch.device
    ) -> None:
        self._steps, self._folder, self._timeline, self._log = frozenset(steps), folder, timeline, log
        self._activities = [ProfilerActivity.CPU]
        if device.type == "cuda":
            self._activities.append(ProfilerActivity.CUDA)

    @contextmanager
    def around(self, step: int) -> Iterator[None]:
        """Profile what runs inside, if it is one of the steps. A disk that does not take the file is a warning."""
        if step not in self._steps:
            yield
            return
        with profile(activities=self._activities) as found:
            begin_s = time.perf_counter()
            with record_function(STEP_MARK):
                yield
        path = self._folder / f"trace_step{step}.json.gz"
        try:
            self._write(found, path, step, begin_s)
        except OSError as error:
            warnings.warn(f"{path}: the trace could not be written: {error}", stacklevel=2)

    def _write(self, found: profile, path: Path, step: int, begin_s: float) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            whole = Path(folder) / "trace.json"
            found.export_chrome_trace(str(whole))
            trace = parse_json(read_regular(whole, max_bytes=MAX_TRACE_BYTES))
            spans = self._timeline.spans if self._timeline.step == step - 1 else ()
            moves = [record for record in self._log.records if record.start_s >= begin_s]
            trace["traceEvents"] += our_events(_offset_us(trace["traceEvents"], begin_s), spans, moves)
            unfinished = Path(folder) / path.name
            with gzip.open(unfinished, "wt", compresslevel=3) as file:
                json.dump(trace, file)
            unfinished.replace(path)


def our_events(
    offset_us: float, spans: Sequence[Mapping[str, Any]], moves: Sequence[TransferRecord]
) -> list[dict[str, Any]]:
    """Blocks and transfers as events of the Chrome trace format, in a process of their own.

    Transfers of one lane may overlap, so they are asynchronous events: a viewer draws them in rows.

    Args:
        offset_us: what is added to microseconds of time.perf_counter.
        spans: of Timeline.
    """
    events: list[dict[str, Any]] = [
        {"ph": "M", "name": "process_name", "pid": OUR_PID, "args": {"name": "headrace: blocks and transfers"}},
        {"ph": "M", "name": "thread_name", "pid": OUR_PID, "tid": "compute", "args": {"name": "compute"}},
    ]
    for span in spans:
        name = span["what"] if span["layer"] < 0 else f"{span['what']} {span['layer']}"
        start_us, length_us = 1e6 * span["start_s"] + offset_us, 1e6 * (span["end_s"] - span["start_s"])
        args = {"micro_batch": span["micro_batch"]}
        events.append(
            {"ph": "X", "name": name, "pid": OUR_PID, "tid": "compute", "ts": start_us, "dur": length_us, "args": args}
        )
    for number, move in enumerate(moves):
        lane = f"{move.tier.value} {move.direction.value}"
        base = {"cat": lane, "name": move.key, "id": number, "pid": OUR_PID, "tid": lane}
        args = {"bytes": move.num_bytes, "waited_us": 1e6 * (move.start_s - move.submit_s)}
        events.append({"ph": "b", "ts": 1e6 * move.start_s + offset_us, "args": args, **base})
        events.append({"ph": "e", "ts": 1e6 * move.end_s + offset_us, **base})
    return events


def _offset_us(events: Sequence[Mapping[str, Any]], begin_s: float) -> float:
    """Microseconds of the trace less those of time.perf_counter."""
    mark = next(event for event in events if event.get("name") == STEP_MARK and event.get("ph") == "X")
    return float(mark["ts"]) - 1e6 * begin_s
