"""The training loop: the whole program in one screen. Every rank runs it, and all ranks take the same turns."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from headrace.storage.core.errors import InputError
from headrace.workers.data.batch import TokenBatch
from headrace.workers.data.loader import TokenLoader
from headrace.workers.job import NewPlan, TrainJob
from headrace.workers.telemetry import names
from headrace.workers.telemetry.records import (
    REPLANNED,
    OnStage,
    OnStep,
    RankEvent,
    RankOutcome,
    ShouldStop,
    Stage,
    StepReport,
)
from headrace.workers.train.checkpoint import Checkpointer, CheckpointFailed, Position
from headrace.workers.train.checkpoint_folder import Manifest
from headrace.workers.train.config import NonFinite
from headrace.workers.train.continuity import NUM_SKIPPED, ROWS, SETTINGS, changes, continuity_facts
from headrace.workers.train.engine import StepResult, StepTotals, TrainEngine
from headrace.workers.train.gauges import StepGauges
from headrace.workers.train.non_finite import NonFiniteSteps
from headrace.workers.train.predicted import predicted_of_step
from headrace.workers.train.step_trace import StepProfiler

NewestPlan = Callable[[], NewPlan | None]
Utilisation = Callable[[Sequence[TokenBatch], float], Mapping[str, float]]


class TrainLoop:
    """Runs a job from where it is to its last step, or until the ranks agree to stop.

    Args:
        profiler: writes traces of the steps that the job names.
        utilisation: MFU metrics of the rank's batches and the step's seconds.
        on_step: called for every finished step; it must not block.
        should_stop: called once per step; if it is true on one rank, all stop after a checkpoint.
        newest_plan: called once per step; when all ranks have a plan that is new to them, all change to it.
        on_stage: called whenever this thread begins another stage.
    """

    def __init__(
        self,
        job: TrainJob,
        engine: TrainEngine,
        loader: TokenLoader,
        checkpointer: Checkpointer,
        gauges: StepGauges,
        *,
        profiler: StepProfiler,
        utilisation: Utilisation,
        on_step: OnStep,
        should_stop: ShouldStop,
        newest_plan: NewestPlan,
        on_stage: OnStage,
    ) -> None:
        self.newest_plan = newest_plan
        self.job, self.engine, self.loader = job, engine, loader
        self.checkpointer, self.gauges, self.profiler = checkpointer, gauges, profiler
        self.utilisation, self.on_step, self.should_stop = utilisation, on_step, should_stop
        self.on_stage, self.non_finite = on_stage, NonFiniteSteps(job, loader)
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
            self.on_stage(Stage.agree)
            new = self.newest_plan()
            is_new = new is not None and new.number > self.job.num_replans
            totals = self.engine.agree(batches, stop=self.should_stop(), has_plan=is_new)
            if totals.stop:
                self.save()
                return RankOutcome.stopped
            if totals.change_plan and new is not None:
                self.change_plan(new)
            self.on_stage(Stage.compute)
            with self.profiler.around(self.step + 1), self.engine.addresses_of_step():
                result = self.engine.train_step(self.step, batches, totals)
            metrics = self.measure(batches, totals, result)
            self.advance(totals)
            metrics |= self.sparse_metrics()
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
            InputError: there are checkpoints and the run may not resume; all are damaged and the run was not told to
                start over; a checkpoint of another model.
        """
        self.on_stage(Stage.resume)
        there = self.checkpointer.folder.committed_steps()
        if there and not may_resume:
            raise InputError(
                f"{self.checkpointer.folder.root} holds checkpoints of steps {there} and this run starts from the "
                "beginning; give another run.dir, or resume"
            )
        manifest, damaged = self.checkpointer.newest(start_over=self.job.start_over)
        for step, problems in damaged:
            words = "; ".join(str(problem) for problem in problems)
            self.note(
                "checkpoint_damaged",
                f"the checkpoint of step {step} is damaged and was renamed and kept: {words}",
                step=step,
            )
        if manifest is None:
            return
        self.non_finite.num_skipped = num_skipped = manifest.facts.get(NUM_SKIPPED, 0)
        had_rng = self.engine.load_state_dict(
            lambda tensors: self.checkpointer.load(manifest, tensors), manifest.step - num_skipped
        )
        self.step = self.saved_step = manifest.step
        self.tokens_seen = manifest.tokens_seen
        self.note("resumed", f"resumed after step {manifest.step}", step=manifest.step)
        self._tell_differences(manifest, had_rng)

    def fetch(self) -> list[TokenBatch]:
        """This rank's micro-batches of the step."""
        self.on_stage(Stage.rows)
        batches = self.loader.step_batches(self.step)
        self.gauges.data_arrived()
        return batches

    def measure(self, batches: Sequence[TokenBatch], totals: StepTotals, result: StepResult) -> dict[str, float]:
        """Metrics of the step that has just ended. A step without targets has no loss, a skipped one no norm either.

        Raises:
            TrainingDiverged: loss or gradient is not finite, and the policy is to stop.
        """
        number = self.step + 1
        if totals.num_targets == 0:
            self.note("empty_step", f"step {number}: no token of the global batch counts in the loss", step=number)
        if not result.is_finite:
            self.note("step_skipped", self.non_finite.meet(self.step, result), step=number)
        predicted = predicted_of_step(self.job, [batch.seq_len for batch in batches])
        # Tensor ranks and the stages of a pipeline read the same tokens.
        num_sharers = self.job.parallel.tensor * self.job.parallel.pipeline
        num_tokens = sum(batch.num_tokens for batch in batches) / num_sharers
        metrics = self.gauges.end_step(num_tokens, predicted, self.engine.block_seconds())
        for event in self.gauges.take_events():
            self.tell(event)
        metrics |= self.engine.sent_gib()
        metrics |= self.utilisation(batches, metrics[names.STEP_S])
        metrics[names.LEARNING_RATE] = result.lr
        if result.is_finite:
            metrics[names.GRAD_NORM] = result.grad_norm
            if result.loss is not None:
                metrics[names.LOSS_TRAIN] = result.loss
        if self.job.train.non_finite is NonFinite.skip:
            metrics[names.SKIPPED_STEPS] = float(self.non_finite.num_skipped)
        return metrics

    def change_plan(self, new: NewPlan) -> None:
        """Follow another plan from the step on that is about to begin."""
        self.job = self.job.changed(new)
        self.engine.change_plan(self.job)
        self.gauges.expect(predicted_of_step(self.job, self.job.lengths))
        number = self.step + 1
        text = f"step {number} and those after it follow plan {new.number} of the run"
        self.note(REPLANNED, text, step=number, number=new.number)

    def advance(self, totals: StepTotals) -> None:
        """The step is done: the next one reads the next rows."""
        self.step += 1
        self.tokens_seen += totals.num_tokens

    def is_due(self, every: int) -> bool:
        """Whether something that happens every so many steps happens now; 0 means never."""
        return every > 0 and self.step % every == 0

    def evaluate(self) -> float:
        """Loss per target on the held-out rows."""
        self.on_stage(Stage.evaluate)
        return self.engine.evaluate(self.loader.eval_batches(self.job.train.eval_batches))

    def sparse_metrics(self) -> dict[str, float]:
        """What page-sparse attention read, and what it costs in loss on held-out rows; nothing for other plans.

        The loss is compared every memory.sparse.compare_every steps and after the last one.
        """
        share, every, train = self.engine.pages_read_pct(), self.job.compare_sparse_every, self.job.train
        found = {} if share is None else {names.SPARSE_PAGES_READ_PCT: share}
        if every and (self.is_due(every) or self.step == train.steps):
            self.on_stage(Stage.evaluate)
            # As many as an evaluation reads: their reader stays open.
            batches = self.loader.eval_batches(train.eval_batches if train.eval_every else 1)
            found |= self.engine.compare_sparse(batches[:1])
        return found

    def report(self, metrics: dict[str, float]) -> None:
        """Call on_step with the step, and with the events since the last report."""
        metrics |= {names.TOKENS_SEEN: float(self.tokens_seen), names.EPOCH: self.loader.epoch_of(self.step)}
        metrics |= self._save_metrics
        if self.job.num_replans:
            metrics[names.REPLANS] = float(self.job.num_replans)
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
        self.on_stage(Stage.save)
        begin_s = time.perf_counter()
        index = self.loader.index
        position = Position(self.step, self.tokens_seen, index.global_batch, self.job.train.seed)
        path = self.checkpointer.save(self.engine.state_dict(), position, self.facts())
        self.saved_step = self.step
        self._save_metrics[names.CHECKPOINT_S] = time.perf_counter() - begin_s
        self.note("checkpoint_saved", f"step {self.step} is saved in {path}", step=self.step)

    def save_or_go_on(self) -> None:
        """Write a checkpoint; a failure is reported and training continues, because the next one may find room."""
        try:
            self.save()
        except CheckpointFailed as error:
            self._save_metrics[names.CHECKPOINT_FAILURES] = 1.0
            self.note("checkpoint_failed", f"step {self.step} was not saved, the older checkpoints are kept: {error}")

    def note(self, kind: str, text: str, **facts: Any) -> None:
        """Keep an event for the next report; rank 0 reports for the group."""
        if self.checkpointer.rank == 0:
            self.tell(RankEvent(kind, text, facts))

    def tell(self, event: RankEvent) -> None:
        """Keep an event that only this rank has."""
        if event.kind not in ("resumed", "step_resumed", "checkpoint_saved", REPLANNED):
            warnings.warn(event.text, stacklevel=2)
        self.events.append(event)

    def facts(self) -> dict[str, Any]:
        """What a checkpoint of this step says about the run."""
        return continuity_facts(self.job, self.loader.index, self.loader.data.digest, self.non_finite.num_skipped)

    def _tell_differences(self, manifest: Manifest, had_rng: bool) -> None:
        """Say what keeps the resumed run from being the uninterrupted one."""
        since, now = f"since the checkpoint of step {manifest.step}", self.facts()
        lines = [f"{change}: rows repeat or are left out" for change in changes(manifest.facts, now, ROWS)]
        if not had_rng:
            lines.append(f"{manifest.world_size} rank(s) wrote it: random generators of the others start from the seed")
        for line in lines:
            self.note("data_changed", f"{since}: {line}", step=manifest.step)
        if changed := changes(manifest.facts, now, SETTINGS):
            self.note("settings_changed", f"{since}: {'; '.join(changed)}", step=manifest.step)
