"""The training loop: the whole program in one screen. Every rank runs it, and all ranks take the same turns."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from headrace.storage.core.errors import InputError
from headrace.workers.data.batch import TokenBatch
from headrace.workers.data.loader import TokenLoader
from headrace.workers.job import TrainJob
from headrace.workers.telemetry import names
from headrace.workers.telemetry.records import OnStep, RankEvent, RankOutcome, ShouldStop, StepReport
from headrace.workers.train.checkpoint import Checkpointer, CheckpointFailed, Position
from headrace.workers.train.checkpoint_folder import Manifest
from headrace.workers.train.engine import StepResult, StepTotals, TrainEngine
from headrace.workers.train.gauges import StepGauges

Utilisation = Callable[[Sequence[TokenBatch], float], Mapping[str, float]]


class TrainLoop:
    """Runs a job from where it is to its last step, or until the ranks agree to stop.

    Args:
        utilisation: MFU metrics of the rank's batches and the step's seconds.
        on_step: told about every finished step; it must not block.
        should_stop: asked once per step; one rank's yes stops all of them after a checkpoint.
    """

    def __init__(
        self,
        job: TrainJob,
        engine: TrainEngine,
        loader: TokenLoader,
        checkpointer: Checkpointer,
        gauges: StepGauges,
        *,
        utilisation: Utilisation,
        on_step: OnStep,
        should_stop: ShouldStop,
    ) -> None:
        self.job, self.engine, self.loader = job, engine, loader
        self.checkpointer, self.gauges = checkpointer, gauges
        self.utilisation, self.on_step, self.should_stop = utilisation, on_step, should_stop
        self.step = self.tokens_seen = 0
        self.saved_step: int | None = None
        self.events: list[RankEvent] = []
        self._num_reported = 0
        self._save_metrics: dict[str, float] = {}

    def run(self, *, may_resume: bool = True) -> RankOutcome:
        """The loop. Returns how it ended; `step` says how far it came.

        Raises:
            InputError: bad data, a checkpoint of another model. TrainingDiverged: loss or gradient is not finite.
            CheckpointFailed: the last checkpoint, which is the result of the run, could not be written.
        """
        self.resume(may_resume)
        while self.step < self.job.train.steps:
            self.gauges.begin_step()
            batches = self.fetch()
            totals = self.engine.agree(batches, stop=self.should_stop(), shift=self.wants_shift())
            if totals.stop:
                self.save()
                return RankOutcome.stopped
            if totals.shift:
                self.shift()
            result = self.engine.train_step(self.step, batches, totals)
            metrics = self.measure(batches, totals, result)
            self.advance(totals)
            if self.is_due(self.job.train.eval_every):
                metrics[names.LOSS_EVAL] = self.evaluate()
            self.report(metrics)
            if self.is_due(self.job.checkpoint.every):
                self.save_or_go_on()
        if self.job.checkpoint.at_end:
            self.save()
        return RankOutcome.finished

    def resume(self, may_resume: bool) -> None:
        """Continue from the newest whole checkpoint of the run folder, if there is one.

        Raises:
            InputError: there are checkpoints and the run may not resume; a checkpoint of another model.
        """
        there = self.checkpointer.folder.committed_steps()
        if there and not may_resume:
            raise InputError(
                f"{self.checkpointer.folder.root} holds checkpoints of steps {there} and this run is to start anew; "
                "give another run.dir, or resume"
            )
        manifest, damaged = self.checkpointer.newest()
        for step, problems in damaged:
            words = "; ".join(str(problem) for problem in problems)
            self.note(
                "checkpoint_damaged", f"the checkpoint of step {step} is damaged and was put aside: {words}", step=step
            )
        if manifest is None:
            return
        had_rng = self.engine.load_state_dict(lambda tensors: self.checkpointer.load(manifest, tensors), manifest.step)
        self.step = self.saved_step = manifest.step
        self.tokens_seen = manifest.tokens_seen
        self.note("resumed", f"resumed after step {manifest.step}", step=manifest.step)
        for what in self._differences(manifest, had_rng):
            self.note("data_changed", f"since the checkpoint of step {manifest.step}: {what}", step=manifest.step)

    def fetch(self) -> list[TokenBatch]:
        """This rank's micro-batches of the step."""
        batches = self.loader.step_batches(self.step)
        self.gauges.data_arrived()
        return batches

    def wants_shift(self) -> bool:
        """Whether this rank's drive is to be left alone from here on, and is not yet."""
        spare = self.job.spare_plan
        return spare is not None and self.engine.plan is not spare and self.gauges.drive_is_over_budget

    def shift(self) -> None:
        """Go over to the plan without the SSD; all ranks do, before the same step."""
        spare = self.job.spare_plan
        assert spare is not None, "only ranks that have a spare plan ask for it"
        self.engine.change_plan(spare)
        self.gauges.follow(spare.predicted)
        self.note(
            "plan_shifted",
            f"step {self.step + 1} and those after it leave the SSD alone: its write budget is used up "
            f"(tiers.ssd.endurance.policy=shift). In force is the plan {spare.name!r} that was solved without it",
            step=self.step,
            plan=spare.to_dict(),
        )

    def measure(self, batches: Sequence[TokenBatch], totals: StepTotals, result: StepResult) -> dict[str, float]:
        """Metrics of the step that has just ended."""
        if totals.num_targets == 0:
            self.note(
                "empty_step", f"step {self.step}: no token of the global batch counts in the loss", step=self.step
            )
        metrics = self.gauges.end_step(sum(batch.tokens.numel() for batch in batches))
        for event in self.gauges.take_events():
            self.tell(event)
        metrics |= self.utilisation(batches, metrics[names.STEP_S])
        metrics |= {names.LOSS_TRAIN: result.loss, names.GRAD_NORM: result.grad_norm, names.LEARNING_RATE: result.lr}
        return metrics

    def advance(self, totals: StepTotals) -> None:
        """The step is done: the next one reads the next rows."""
        self.step += 1
        self.tokens_seen += totals.num_tokens

    def is_due(self, every: int) -> bool:
        """Whether something that happens every so many steps happens now; 0 means never."""
        return every > 0 and self.step % every == 0

    def evaluate(self) -> float:
        """Loss per target on the held-out rows."""
        return self.engine.evaluate(self.loader.eval_batches(self.job.train.eval_batches))

    def report(self, metrics: dict[str, float]) -> None:
        """Tell on_step about the step, with what happened since the last report."""
        metrics |= {names.TOKENS_SEEN: float(self.tokens_seen), names.EPOCH: self.loader.epoch_of(self.step)}
        metrics |= self._save_metrics
        events, self._num_reported = tuple(self.events[self._num_reported :]), len(self.events)
        self._save_metrics = {}
        self.on_step(StepReport(self.step, self.checkpointer.rank, metrics, events))

    def save(self) -> None:
        """Write a checkpoint of the step, unless there is one.

        Raises:
            CheckpointFailed: it did not reach the disk; the older ones are as they were.
        """
        if self.saved_step == self.step:
            return
        begin_s = time.perf_counter()
        index = self.loader.index
        position = Position(self.step, self.tokens_seen, index.global_batch, self.job.train.seed)
        path = self.checkpointer.save(self.engine.state_dict(), position, {"data_digest": self.loader.data.digest})
        self.saved_step = self.step
        self._save_metrics[names.CHECKPOINT_S] = time.perf_counter() - begin_s
        self.note("checkpoint_saved", f"step {self.step} is saved in {path}", step=self.step)

    def save_or_go_on(self) -> None:
        """Write a checkpoint; a failure is reported and training goes on, for the next one may find room."""
        try:
            self.save()
        except CheckpointFailed as error:
            self._save_metrics[names.CHECKPOINT_FAILURES] = 1.0
            self.note("checkpoint_failed", f"step {self.step} was not saved, the older checkpoints stand: {error}")

    def note(self, kind: str, text: str, **facts: Any) -> None:
        """Remember an event for the next report; rank 0 speaks for the group."""
        if self.checkpointer.rank == 0:
            self.tell(RankEvent(kind, text, facts))

    def tell(self, event: RankEvent) -> None:
        """Remember an event that this rank alone knows of."""
        if event.kind not in ("resumed", "checkpoint_saved"):
            warnings.warn(event.text, stacklevel=2)
        self.events.append(event)

    def _differences(self, manifest: Manifest, had_rng: bool) -> list[str]:
        """What keeps the resumed run from being the uninterrupted one."""
        now = {
            "rows per step": (manifest.global_batch, self.loader.index.global_batch),
            "train.seed": (manifest.seed, self.job.train.seed),
            "data digest": (manifest.facts.get("data_digest"), self.loader.data.digest),
        }
        found = [
            f"{what} was {was}, is {value}: rows repeat or are left out"
            for what, (was, value) in now.items()
            if was != value
        ]
        if not had_rng:
            found.append(f"{manifest.world_size} rank(s) wrote it: random generators of the others start from the seed")
        return found
