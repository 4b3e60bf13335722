"""Records of a half-done step of the sweep by chunk, and how the next process goes on from them.

After every few chunks of stage 2 each rank writes what its part of the step consists of: which blobs of the tiers hold
keys, values and their gradients, and all other tensors (chunk_record.py). The slots of these blobs stay pinned, so the
step goes on without a copy of them. When all ranks have written, they remove the record before it: so the newest record
that all ranks have is the newest of the rank that has come least far.

A rank that was killed is started again with the same leases. If the owners of the slabs are still there, so are the
bytes, and the ranks go on from the record. They all do, or none does: then the step restarts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import nn

from headrace.storage.core.errors import TransferFailed
from headrace.storage.keeping import Pinned, StoredBlob
from headrace.storage.stack import TierStack
from headrace.workers.data.batch import TokenBatch
from headrace.workers.job import RankContext, TrainJob
from headrace.workers.memory.chunk_record import PassState
from headrace.workers.parallel.process_group import gathered
from headrace.workers.train.record_files import Record, RecordDamaged, RecordFiles
from headrace.workers.train.waiting_gradients import read_gradients, write_gradients

SCHEMA_VERSION = 1
# What the numbers of a step follow from, apart from its weights, rows and leases.
_JOB_PARTS = ("model", "data", "parallel", "plan", "bucket_plans", "train", "adapter")
_PASS, _GRADIENT, _LOSSES = "pass:", "gradient:", "losses"

Note = Callable[[str, str], None]


class StepRecords:
    """Writes and reads the records of one rank. All ranks call alike, but for `close`.

    Args:
        folder: of the rank.
        every: chunks of stage 2 between two records.
        facts: JSON-able; a record of other facts is not used. See facts_of.
        stack: the rank's tiers; None where nothing moves.
    """

    def __init__(self, folder: Path, every: int, facts: Mapping[str, Any], stack: TierStack | None) -> None:
        self._files, self._every, self._facts, self._stack = RecordFiles(folder), every, facts, stack
        self._note: Note = lambda kind, text: None
        self._saved_step: Callable[[], int | None] = lambda: None
        self._model: nn.Module | None = None
        self._looked = self._keeps = False
        self._number = 0
        self._step, self._rows = 0, ""
        self._micro_batch = 0
        self._losses: list[torch.Tensor] = []
        self._found: PassState | None = None
        self._gradients: dict[str, torch.Tensor] = {}
        self._pinned: Pinned | None = None

    def follow(self, model: nn.Module, note: Note, saved_step: Callable[[], int | None]) -> None:
        """The loop that makes the steps.

        Args:
            model: sharded, whose gradients wait for the end of a step.
            note: called with the kind of an event and its text.
            saved_step: the step after which the newest checkpoint was written. Records of the step that follows are of
                use, and those of the first step; no others are written.
        """
        self._model, self._note, self._saved_step = model, note, saved_step

    def change_plan(self, job: TrainJob) -> None:
        """The steps that follow have the plans of this job: a record of one is of no use under another plan."""
        self._facts = {**self._facts, **_digests(job)}

    def begin(self, step: int, batches: Sequence[TokenBatch]) -> tuple[int, list[torch.Tensor]]:
        """A step begins; the first one of a process may go on where another process was.

        Returns:
            The micro-batch to begin with, and the losses of those before it.
        """
        self._step, self._rows, self._keeps = step, rows_digest(batches), step in (0, self._saved_step())
        self._micro_batch, self._losses = 0, []
        if not self._looked:
            self._looked = True
            self._find(len(batches))
        return self._micro_batch, list(self._losses)

    def end_pass(self, losses: Sequence[torch.Tensor]) -> None:
        """It is done, and another one follows."""
        self._losses, self._micro_batch = list(losses), self._micro_batch + 1
        if self._keeps:
            self._write(None)

    def end(self) -> None:
        """The step's gradients are complete: its records are of no use any more."""
        self._files.remove()
        self.close()

    def close(self) -> None:
        """Give the slots back that only records need; the files stay."""
        pinned, self._pinned = self._pinned, None
        if pinned is not None:
            pinned.release()

    def take(self) -> PassState | None:
        """See PassRecords."""
        found, self._found = self._found, None
        return found

    def chunk_done(self, num_done: int, state: Callable[[], PassState]) -> None:
        """See PassRecords."""
        if self._keeps and num_done % self._every == 0:
            self._write(state())

    def before_backward(self) -> None:
        """See PassRecords."""
        if self._gradients:
            assert self._model is not None, "follow comes first"
            write_gradients(self._model, self._gradients)
            self._gradients = {}

    def _write(self, state: PassState | None) -> None:
        """Write a record, and remove the one before it when all ranks have written theirs."""
        assert self._model is not None, "follow comes first"
        pinned = None
        if state is not None and state.keys:
            assert self._stack is not None, "a blob is in a tier"
            pinned = self._stack.pin(state.keys)
        body = {
            "facts": self._facts,
            "step": self._step,
            "rows": self._rows,
            "micro_batch": self._micro_batch,
            "pass": None if state is None else {"num_done": state.num_done, "table": state.table},
            "blobs": [] if pinned is None else [blob.to_json() for blob in pinned.blobs],
        }
        gradients = self._gradients or read_gradients(self._model)
        tensors = {_GRADIENT + name: grad for name, grad in gradients.items()}
        tensors |= {} if state is None else {_PASS + name: tensor for name, tensor in state.tensors.items()}
        if self._losses:
            tensors[_LOSSES] = torch.stack(self._losses)
        self._number += 1
        error = None
        try:
            self._files.write(self._number, body, tensors)
        except OSError as found:
            error = str(found)
        errors = [each for each in gathered(error) if each is not None]
        if errors:
            if pinned is not None:
                pinned.release()
            self._note(
                "record_failed", f"step {self._step + 1}: a record was not written, and the step goes on: {errors[0]}"
            )
            return
        self._files.remove(but=self._number)
        self.close()
        self._pinned = pinned

    def _find(self, num_micro_batches: int) -> None:
        """Go on from the newest record that all ranks have, if it is one of this step."""
        there, problems = self._usable(num_micro_batches)
        every = gathered((max(there, default=0), problems))
        number = min(newest for newest, _ in every)
        reasons = [problem for _, found in every for problem in found]
        if number == 0 and not any(newest or found for newest, found in every):
            return
        error: str | None = reasons[0] if reasons else "not all ranks have a record"
        if number:
            error = self._adopt(there[number]) if number in there else f"record {number} is gone"
            errors = [each for each in gathered(error) if each is not None]
            error = errors[0] if errors else None
        if error is None:
            # The same numbers on all ranks from here on.
            self._number = number
            self._files.remove(but=number)
            self._note("step_resumed", f"step {self._step + 1} {self._where()}")
            return
        self._forget()
        self._note("step_restarted", f"step {self._step + 1} restarts from its beginning: {error}")

    def _usable(self, num_micro_batches: int) -> tuple[dict[int, Record], list[str]]:
        """Records of this step by number, and why others are not."""
        found: dict[int, Record] = {}
        problems = []
        for number in self._files.numbers():
            try:
                record = self._files.read(number)
                if record.body["step"] < self._step:
                    continue  # its step is done: it was left by a rank that ended before it removed it
                if (problem := self._problem(record.body, num_micro_batches)) is None:
                    found[number] = record
                else:
                    problems.append(problem)
            except RecordDamaged as error:
                problems.append(str(error))
        return found, problems

    def _problem(self, body: Mapping[str, Any], num_micro_batches: int) -> str | None:
        """Why a record is not one of this step."""
        facts = body["facts"]
        changed = [name for name in self._facts if facts.get(name) != self._facts[name]]
        if changed:
            return f"the record has other facts: {', '.join(changed)}"
        if body["step"] != self._step:
            return f"the record is one of step {body['step'] + 1}"
        if body["rows"] != self._rows or body["micro_batch"] >= num_micro_batches:
            return "the record is one of other rows"
        return None

    def _adopt(self, record: Record) -> str | None:
        """Take a record over. Returns why it cannot be; then nothing has changed."""
        body = record.body
        try:
            tensors = self._files.tensors(record)
            blobs = [StoredBlob.from_json(row) for row in body["blobs"]]
            if blobs and self._stack is None:
                return "its blobs are in a tier, and none is open"
            if self._stack is not None and blobs:
                self._pinned = self._stack.adopt(blobs)
        except (ValueError, TransferFailed) as error:
            return str(error)
        self._micro_batch = body["micro_batch"]
        self._losses = list(tensors.pop(_LOSSES, torch.empty(0)))
        self._gradients = _with_prefix(tensors, _GRADIENT)
        if body["pass"] is not None:
            keys = tuple(blob.key for blob in blobs)
            self._found = PassState(**body["pass"], tensors=_with_prefix(tensors, _PASS), keys=keys)
        return None

    def _forget(self) -> None:
        """As if there were no record."""
        if self._pinned is not None:
            assert self._stack is not None, "it has adopted"
            for blob in self._pinned.blobs:
                self._stack.discard(blob.key)
        self.close()
        self._micro_batch, self._losses, self._found, self._gradients = 0, [], None, {}
        self._files.remove()

    def _where(self) -> str:
        words = f"goes on in micro-batch {self._micro_batch + 1}"
        return words if self._found is None else f"{words}, after chunk {self._found.num_done} of stage 2"


def facts_of(job: TrainJob, context: RankContext) -> dict[str, Any]:
    """What must be equal for a record to be used: everything that the bits of a step follow from, and the leases.

    A lease names its slab by the process that owns it: another owner has other bytes.
    """
    facts: dict[str, Any] = {"schema": SCHEMA_VERSION, "torch": torch.__version__, "device": context.device}
    facts |= {"rank": context.rank, "ranks": context.world_size}
    facts["leases"] = [
        [lease.medium.value, *lease.paths, lease.offset_bytes, lease.num_bytes] for lease in context.leases
    ]
    return facts | _digests(job)


def _digests(job: TrainJob) -> dict[str, str]:
    return {name: _digest(getattr(job, name)) for name in _JOB_PARTS}


def rows_digest(batches: Sequence[TokenBatch]) -> str:
    """Of tokens, targets and documents of a step."""
    state = xxhash.xxh3_64()
    for batch in batches:
        for tensor in (batch.tokens, batch.targets):
            state.update(tensor.contiguous().numpy().data)
        state.update(repr((tuple(batch.tokens.shape), batch.packing.lengths, batch.packing.parents)).encode())
    return state.hexdigest()


def _digest(part: Any) -> str:
    plain = asdict(part) if is_dataclass(part) and not isinstance(part, type) else part
    if isinstance(plain, Mapping):
        plain = {str(key): asdict(each) if is_dataclass(each) else each for key, each in plain.items()}  # type: ignore[arg-type]
    return xxhash.xxh3_64_hexdigest(json.dumps(plain, default=str, sort_keys=True).encode())


def _with_prefix(tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
