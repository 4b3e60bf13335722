"""What Ray costs: the same job through Ray actors and in plain processes of this machine, in turns, in one run."""

from __future__ import annotations

import shlex
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from headrace.bench.harness import OptionValue, Row, Target
from headrace.platform.config.load import load_run_config
from headrace.platform.config.schema import RunConfig
from headrace.platform.control.config import Launcher
from headrace.platform.control.job import make_job, resolve
from headrace.platform.control.launch import launch
from headrace.platform.control.states import Outcome
from headrace.platform.planning.from_config import request_from_config
from headrace.platform.planning.lengths import slab_bytes, solve_plans
from headrace.storage.core.errors import HeadraceError, InputError
from headrace.storage.core.records import Medium
from headrace.workers.data.prepare import prepare
from headrace.workers.telemetry import names
from headrace.workers.telemetry.records import RankEvent, StepReport

DESCRIPTION = "step time with Ray, compared with the same engine in a plain process; target: at most 2 % more"
OPTIONS: Mapping[str, OptionValue] = {"steps": 10, "rounds": 3, "seq_len": 2048, "overrides": ""}
LIMIT_PCT = 2.0
# The first steps of a group allocate and warm caches.
WARM_UP_STEPS = 2


class StepTimes:
    """A recorder that keeps the seconds of every step: of the slowest rank, as the group feels it."""

    def __init__(self) -> None:
        self._by_step: dict[int, float] = {}

    @property
    def warm(self) -> list[float]:
        """Seconds per step, without the first ones."""
        return [seconds for step, seconds in sorted(self._by_step.items()) if step > WARM_UP_STEPS]

    def on_report(self, report: StepReport) -> None:
        """See Recorder."""
        self._by_step[report.step] = max(self._by_step.get(report.step, 0.0), report.metrics[names.STEP_S])

    def on_event(self, event: RankEvent) -> None:
        """See Recorder."""

    def on_stage(self, text: str) -> None:
        """Not needed."""

    def on_plan(self, record: Mapping[str, Any]) -> None:
        """Not needed."""

    def on_part(self, text: str) -> None:
        """Not needed."""


def run(options: Mapping[str, OptionValue]) -> Iterator[Row]:
    """One row per launcher and round, and one with the comparison.

    Args:
        options: steps per group, rounds (of both launchers each; who goes first alternates), seq_len, and further words
            of the configuration in overrides.

    Raises:
        InputError: too few steps or rounds, or a bad override. HeadraceError: a run failed.
    """
    steps, rounds = int(options["steps"]), int(options["rounds"])
    if steps <= WARM_UP_STEPS or rounds < 1:
        raise InputError(f"steps={steps} rounds={rounds}: more than {WARM_UP_STEPS} steps and at least one round")
    words = ["tracking=files", "checkpoint=none", f"data.seq_len={options['seq_len']}", f"train.steps={steps}"]
    config = ready(load_run_config([*words, *shlex.split(str(options["overrides"]))]).config)
    times: dict[Launcher, list[list[float]]] = {Launcher.inline: [], Launcher.ray: []}
    for number in range(rounds):
        order = list(times) if number % 2 == 0 else list(times)[::-1]
        for launcher in order:
            warm = measure(config, launcher)
            times[launcher].append(warm)
            yield Row(
                f"{launcher.value}_{number}",
                {"step_s_median": median(warm), "step_s_min": min(warm), "num_warm_steps": len(warm)},
                {"launcher": launcher.value, "round": number, "step_s": warm},
            )
    yield comparison(times[Launcher.inline], times[Launcher.ray], describe(config))


def ready(config: RunConfig) -> RunConfig:
    """The configuration with prepared data, the data's vocabulary and the device of its hardware.

    Raises:
        InputError: the data has token ids beyond the model's vocabulary.
    """
    return resolve(config, prepare(config.data))


def measure(config: RunConfig, launcher: Launcher) -> list[float]:
    """Seconds of the warm steps of one run in a folder that is removed afterwards.

    Raises:
        HeadraceError: the run did not finish.
    """
    request = request_from_config(config, config.model.vocab_size)
    plans = solve_plans(request)
    slabs = slab_bytes(plans, request)
    recorder = StepTimes()
    with tempfile.TemporaryDirectory(prefix="headrace-bench-") as folder:
        # The GEMM rate that MFU is a share of need not be measured in every round.
        job = replace(make_job(config, plans, Path(folder)), peak_flops=1e12)
        outcome = launch(
            job,
            replace(config.cluster, launcher=launcher),
            recorder,
            host_bytes=slabs[Medium.host],
            ssd_bytes=slabs[Medium.ssd],
            ssd_folders=config.tiers.ssd.folders or (Path(folder) / "tiers",),
        )
    if outcome.outcome is not Outcome.finished or not recorder.warm:
        raise HeadraceError(f"the run with launcher={launcher.value} did not finish: {outcome.failure}")
    return recorder.warm


def comparison(
    inline: Sequence[Sequence[float]],
    ray: Sequence[Sequence[float]],
    config: Mapping[str, object],
    *,
    words: tuple[str, str] = ("inline", "ray"),
    limit_pct: float = LIMIT_PCT,
) -> Row:
    """Ray against no Ray, or anything else against its absence, from all warm steps of all rounds.

    `overhead_pct` compares medians, `overhead_of_fastest_pct` the fastest steps, which other work on the machine
    touches least. `noise_pct` is how far the first rounds lie apart: where it is above the limit the machine was too
    busy for a result, and the target counts as unmet.
    """
    alone, through = [s for one in inline for s in one], [s for one in ray for s in one]
    rounds = [median(one) for one in inline]
    overhead = 100.0 * (median(through) / median(alone) - 1.0)
    numbers = {
        f"{words[0]}_step_s": median(alone),
        f"{words[1]}_step_s": median(through),
        "overhead_pct": overhead,
        "overhead_of_fastest_pct": 100.0 * (min(through) / min(alone) - 1.0),
        "noise_pct": 100.0 * (max(rounds) - min(rounds)) / median(rounds),
        "num_rounds": len(rounds),
    }
    noise = numbers["noise_pct"]
    busy = f"; the {words[0]} rounds differ by {noise:.1f} %: too busy for a result" if noise > limit_pct else ""
    met = overhead <= limit_pct and not busy
    return Row("overhead", numbers, config, Target(f"at most {limit_pct:g} % of the step time{busy}", met))


def describe(config: RunConfig) -> dict[str, object]:
    """What was run, for the row."""
    return {
        "model": config.model.name,
        "seq_len": config.data.seq_len,
        "memory": config.memory.preset.value,
        "num_ranks": config.cluster.num_ranks,
        "num_threads": config.train.num_threads,
        "device": config.train.device.value,
        "precision": config.train.precision.value,
    }
