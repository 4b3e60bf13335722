"""What all records of a run cost: steps of one second with them and without, in turns, in one process."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch

from headrace.bench.harness import OptionValue, Row
from headrace.bench.ray_overhead import comparison
from headrace.helpers.training import foreign_plan
from headrace.platform.control.config import ClusterConfig
from headrace.platform.control.ray_session import ray_session
from headrace.platform.tracking.config import Progress, TrackingConfig
from headrace.platform.tracking.recorder import RunRecorder
from headrace.storage.core.errors import InputError
from headrace.workers.actors.journal import ReportJournal
from headrace.workers.telemetry import names
from headrace.workers.telemetry.records import StepReport

DESCRIPTION = "a step of 1 s with the journal, Ray's gauges, the run folder and MLflow; target: at most 1 % more"
OPTIONS: Mapping[str, OptionValue] = {"steps": 6, "rounds": 3, "step_s": 1.0}
LIMIT_PCT = 1.0
SIZE = 512
Tell = Callable[[StepReport], None]


def run(options: Mapping[str, OptionValue]) -> Iterator[Row]:
    """One row with the comparison.

    Args:
        options: steps of a round, rounds (of both kinds each; which goes first alternates), seconds of a step.

    Raises:
        InputError: no steps or rounds.
    """
    steps, rounds, step_s = int(options["steps"]), int(options["rounds"]), float(options["step_s"])
    if steps < 1 or rounds < 1 or step_s <= 0.0:
        raise InputError(f"steps={steps} rounds={rounds} step_s={step_s:g}: at least one, and more than 0 seconds")
    torch.set_num_threads(1)
    work = torch.ones(SIZE, SIZE)
    multiply(work, 20)
    begin_s = time.perf_counter()
    multiply(work, 100)
    products = max(1, round(step_s / (time.perf_counter() - begin_s) * 100))
    times: dict[bool, list[list[float]]] = {False: [], True: []}
    calls: list[float] = []
    with ray_session(ClusterConfig(address="local", dashboard=False)):
        for number in range(rounds):
            for recorded in (False, True) if number % 2 == 0 else (True, False):
                with records() if recorded else nullcontext() as tell:
                    times[recorded].append([one_step(work, products, step, tell, calls) for step in range(steps)])
    row = comparison(times[False], times[True], {}, words=("bare", "recorded"), limit_pct=LIMIT_PCT)
    call_ms = 1e3 * median(calls)  # the training thread waits for so long, and for no more
    yield replace(row, numbers={**row.numbers, "call_ms": call_ms, "num_steps": steps * rounds})


def multiply(work: torch.Tensor, products: int) -> None:
    """So many products of matrices, on the calling thread."""
    for _ in range(products):
        torch.mm(work, work)


def one_step(work: torch.Tensor, products: int, step: int, tell: Tell | None, calls: list[float]) -> float:
    """Seconds of a step; those of its records are added to `calls`."""
    report = report_of(step + 1)
    begin_s = time.perf_counter()
    multiply(work, products)
    if tell is None:
        return time.perf_counter() - begin_s
    called_s = time.perf_counter()
    tell(report)
    calls.append(time.perf_counter() - called_s)
    return time.perf_counter() - begin_s


def report_of(step: int) -> StepReport:
    """A report with every metric that there is."""
    metrics = [value for name, value in vars(names).items() if name.isupper()]
    return StepReport(step, 0, dict.fromkeys(metrics, 1.0 + step / 7.0))


@contextmanager
def records() -> Iterator[Tell]:
    """Those of a rank and of its driver, in this process: in a run they are in two."""
    from headrace.platform.control.event_counter import EventCounter
    from headrace.workers.actors.gauges import RankGauges

    with ExitStack() as ending:
        folder = Path(ending.enter_context(tempfile.TemporaryDirectory(prefix="headrace-bench-")))
        config = TrackingConfig(mlflow=True, progress=Progress.off)
        recorder = RunRecorder(folder / "runs" / "one", config, num_ranks=1, num_steps=100)
        recorder.start("a: 1\n", foreign_plan("keep", 2), {})
        ending.callback(recorder.finish, "finished", {})
        counted, gauges = EventCounter(recorder, "bench"), RankGauges("bench", 0)
        ending.callback(gauges.close)
        journal = ending.enter_context(ReportJournal(folder / "reports.jsonl"))
        time.sleep(5.0)  # MLflow is imported in the background, once in a run

        def tell(report: StepReport) -> None:
            journal.append(report)
            gauges.update(report.metrics)
            counted.on_report(report)

        yield tell
