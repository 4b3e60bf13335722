"""Resume inside a step of the sweep by chunk: a run that ends between or inside chunks and goes on in new objects has
the bits of one that was not interrupted; what cannot be trusted makes the step restart."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from headrace.helpers.linear_attention import LINEAR_ATTENTION
from headrace.helpers.training import tiny_leases
from headrace.storage.core.records import Lease, Medium
from headrace.workers.job import RankContext, TrainJob
from headrace.workers.memory.chunk_plan import KvShape, kv_bytes
from headrace.workers.memory.config import KvPlace, MemoryPreset, SparseConfig
from headrace.workers.memory.plan import Residence, Stretch
from headrace.workers.memory.policy import skeletons_of
from headrace.workers.memory.presets import Choices, preset_plan
from headrace.workers.memory.sparse_keys import SparseKeys
from headrace.workers.model.decoder import Decoder
from headrace.workers.model.skeleton import dense_skeleton
from headrace.workers.telemetry import names
from headrace.workers.telemetry.records import Stage, StepPart, StepReport
from headrace.workers.train.config import CheckpointConfig, Precision
from headrace.workers.train.model_state import STATE_FOLDER
from headrace.workers.train.record_files import RecordFiles
from headrace.workers.train.session import rank_folder, run_rank
from headrace.workers.train.state_files import state_file

Place = tuple[int, int, int]  # micro-batch, stage and chunk, all counted from 1
NO_PAGES = SparseConfig()
NUM_CHUNKS = 3  # rows of 32 tokens in chunks of 12
PLACES = [(micro_batch, 2, number) for micro_batch in (1, 2) for number in range(1, NUM_CHUNKS + 1)]


class Killed(Exception):
    """Stands for the SIGKILL of a rank: no object of its process is used again."""


@dataclass
class Process:
    """One process of a run of two steps, which may end in the second one.

    Args:
        until: where it ends.
        num_blocks: it ends when so many blocks of that chunk have begun, forward or backward.
    """

    until: Place | None
    num_blocks: int
    reports: list[StepReport] = field(default_factory=list)
    places: list[Place] = field(default_factory=list)
    events: dict[str, str] = field(default_factory=dict)
    peaks: dict[str, int] = field(default_factory=dict)  # of the tiers, in the last step

    def run(self, job: TrainJob, leases: tuple[Lease, ...], attempt: int) -> Process:
        """Returns itself when it has ended."""
        context, begun = RankContext(leases=leases, attempt=attempt), [0]

        def on_stage(stage: Stage, part: StepPart | None = None) -> None:
            if part is None or stage is not Stage.compute:
                return
            place = (part.micro_batch, part.stage, part.number)
            if not self.places or self.places[-1] != place:
                self.places.append(place)
                begun[0] = -1
            begun[0] += 1
            is_second = len(self.reports) == (0 if attempt else 1)
            if is_second and place == self.until and begun[0] >= self.num_blocks:
                raise Killed

        try:
            result = run_rank(job, context, on_step=self.reports.append, should_stop=lambda: False, on_stage=on_stage)
            self.events = {event["kind"]: event["text"] for event in result.stats["events"]}
            tiers = {} if result.stats["tiers"] is None else result.stats["tiers"]["tiers"]
            self.peaks = {name: record["peak_bytes"] for name, record in tiers.items()}
        except Killed:
            assert self.until is not None
        return self


def bits(job: TrainJob, *processes: Process) -> tuple[Any, ...]:
    """Losses, gradient norms, and final weights and moments."""
    keys = (names.LOSS_TRAIN, names.GRAD_NORM)
    curve = {report.step: [report.metrics[key] for key in keys] for each in processes for report in each.reports}
    state = Path(job.run_dir) / "checkpoints" / "step_000002" / STATE_FOLDER / state_file(0)
    return curve, {name: tensor.tolist() for name, tensor in load_file(state).items()}


@pytest.fixture(scope="module")
def leases(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Lease, ...]]:
    with tiny_leases(tmp_path_factory.mktemp("leases")) as per_rank:
        yield per_rank[0]


@pytest.fixture(scope="module")
def chunk_job(job) -> Callable[..., TrainJob]:
    """A run of two steps by chunk that keeps a record of every chunk; KV blocks of two chunks where that is told."""

    def make(
        preset: str = "chunk_host",
        *,
        kv_block: int = 12,
        every_chunks: int = 1,
        sparse: SparseConfig = NO_PAGES,
        **fields: Any,
    ) -> TrainJob:
        made = job(
            checkpoint=CheckpointConfig(every=1, every_chunks=every_chunks, at_end=False),
            train={"steps": 2, **fields.pop("train", {})},
            **fields,
        )
        choices = Choices(seq_len=32, chunk_size=12, sparse=sparse)
        plan = preset_plan(MemoryPreset(preset), [dense_skeleton(made.model)] * made.model.num_layers, choices=choices)
        return replace(made, plan=replace(plan, cuts=replace(plan.cuts, kv_block=kv_block)))

    return make


def process(job: TrainJob, leases: Any, attempt: int, until: Place | None = None, num_blocks: int = 0) -> Process:
    return Process(until, num_blocks).run(job, leases, attempt)


def records(job: TrainJob) -> list[str]:
    return sorted(path.name for path in rank_folder(Path(job.run_dir), 0).glob("record-*"))


def test_a_step_that_ends_in_every_chunk_has_the_same_bits(chunk_job, leases) -> None:
    """Seven processes, each of which does one chunk and ends inside the next one: in its forward or its backward."""
    whole = chunk_job("chunk_ssd", kv_block=24, train={"precision": Precision.bf16})
    wanted = bits(whole, process(whole, leases, 0))
    job = replace(whole, run_dir=whole.run_dir + "-ended")
    found = [process(job, leases, n, place, num_blocks=2 * n % 7) for n, place in enumerate(PLACES)]
    assert len(records(job)) == 2, "one record, of two files"
    found.append(process(job, leases, len(PLACES)))
    assert [each.places[0] for each in found[1:]] == PLACES
    assert found[-1].places == [PLACES[-1]]
    assert "goes on in micro-batch 2, after chunk 2 of stage 2" in found[-1].events["step_resumed"]
    assert bits(job, *found) == wanted
    assert records(job) == []


def test_states_of_scans_and_blocks_in_every_place_survive(chunk_job, leases) -> None:
    """And a record of every second chunk: the last one is the newest that is older than the end of the process."""
    whole = chunk_job(model={"mixers": [LINEAR_ATTENTION, "attention"]}, every_chunks=2)
    skeletons = skeletons_of(Decoder(whole.model).blocks)
    plan = preset_plan(MemoryPreset.chunk, skeletons, choices=Choices(seq_len=32, chunk_size=8))
    places = Stretch(0, 8, Residence.hbm), Stretch(8, 16, Residence.ssd), Stretch(16, None, Residence.host)
    whole = replace(whole, plan=replace(plan, kv=places, kv_grads=places))
    wanted = bits(whole, process(whole, leases, 0))
    job = replace(whole, run_dir=whole.run_dir + "-ended")
    ends = [(1, 2, 4), (2, 1, 2), (2, 2, 4)]
    found = [process(job, leases, n, place, num_blocks=3) for n, place in enumerate(ends)]
    found.append(process(job, leases, len(ends)))
    assert [each.places[0] for each in found[1:]] == [(1, 2, 3), (2, 1, 1), (2, 2, 3)]
    assert bits(job, *found) == wanted


@pytest.mark.parametrize("place", [KvPlace.host, KvPlace.hbm])
def test_the_choice_of_pages_survives(chunk_job, leases, place: KvPlace) -> None:
    """Of the last layer it is made in stage 2, from mean keys that stage 1 has left."""
    sparse = SparseConfig(page=4, budget=2, sink=0, recent=0, place=place)
    whole = chunk_job("chunk_sparse", sparse=sparse)
    done = process(whole, leases, 0)
    wanted = bits(whole, done)
    job = replace(whole, run_dir=whole.run_dir + "-ended")
    ends = [(1, 2, 1), (1, 2, 2), (2, 2, 3)]
    found = [process(job, leases, n, end, num_blocks=3) for n, end in enumerate(ends)]
    found.append(process(job, leases, len(ends)))
    assert [each.places[0] for each in found[1:]] == ends
    assert bits(job, *found) == wanted
    pages = [each.reports[-1].metrics[names.SPARSE_PAGES_READ_PCT] for each in (done, found[-1])]
    assert pages[0] == pages[1] < 100


def test_mean_keys_that_a_record_loses_change_the_bits(chunk_job, monkeypatch: pytest.MonkeyPatch) -> None:
    """The record before stage 2: the last layer has chosen nothing yet."""
    right = SparseKeys.restore_choice

    def restore(self: SparseKeys, tensors: Mapping[str, torch.Tensor]) -> None:
        right(self, {name: -tensor if name.startswith("means") else tensor for name, tensor in tensors.items()})

    sparse = SparseConfig(page=4, budget=2, sink=0, recent=0, place=KvPlace.hbm)
    whole = chunk_job("chunk_sparse", sparse=sparse)
    wanted = bits(whole, process(whole, (), 0))
    for number, change in enumerate((right, restore)):
        monkeypatch.setattr(SparseKeys, "restore_choice", change)
        job = replace(whole, run_dir=f"{whole.run_dir}-ended-{number}")
        found = [process(job, (), 0, (1, 2, 1), num_blocks=1), process(job, (), 1)]
        assert found[1].places[0] == (1, 2, 1)
        assert (bits(job, *found) == wanted) == (change is right)


@pytest.fixture(scope="module")
def wanted(chunk_job) -> tuple[Any, ...]:
    """The bits of a run that nothing interrupts, wherever its keys and values are."""
    job = chunk_job("chunk", every_chunks=0)
    return bits(job, process(job, (), 0))


def test_without_a_tier_everything_is_in_the_record(chunk_job, wanted) -> None:
    job = chunk_job("chunk")
    found = [process(job, (), 0, (2, 2, 3), num_blocks=4), process(job, (), 1)]
    assert found[1].places[0] == (2, 2, 3)
    assert bits(job, *found) == wanted


def test_what_a_record_names_is_not_overwritten_before_the_next_one(chunk_job, leases, wanted) -> None:
    """The process ends when it has stored new gradients of blocks whose older ones the record names."""
    job = chunk_job("chunk_ssd")
    found = [process(job, leases, 0, (2, 2, 2), num_blocks=5), process(job, leases, 1)]
    assert found[1].places[0] == (2, 2, 2)
    assert bits(job, *found) == wanted


@pytest.fixture(scope="module")
def ended_leases(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Lease, ...]]:
    """What `ended` has left in them is not touched by other tests."""
    with tiny_leases(tmp_path_factory.mktemp("ended")) as per_rank:
        yield per_rank[0]


@pytest.fixture(scope="module")
def ended(chunk_job, ended_leases) -> TrainJob:
    """A run whose process has ended in its second micro-batch."""
    job = chunk_job("chunk_ssd")
    job = replace(job, plan=replace(job.plan, kv_grads=(Stretch(0, None, Residence.host),)))
    process(job, ended_leases, 0, (2, 2, 3))
    return job


def rewritten(job: TrainJob, change: Callable[[dict[str, Any]], None]) -> None:
    """Write the record again, with the digests of what it says now."""
    files = RecordFiles(rank_folder(Path(job.run_dir), 0))
    (number,) = files.numbers()
    record = files.read(number)
    tensors = files.tensors(record)
    change(record.body)
    files.write(number, record.body, tensors)


def flip(path: str | Path, at: int) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 16]))


@contextmanager
def damaged(job: TrainJob, leases: Any, what: str) -> Iterator[TrainJob]:
    """The job after something has gone wrong with its record, its blobs, or itself."""
    folder = rank_folder(Path(job.run_dir), 0)
    by_medium = {lease.medium: lease for lease in leases}
    blobs = next(iter(_bodies(folder)))["blobs"]
    if what in ("host", "ssd"):
        lease = by_medium[Medium(what)]
        offset = next(row[2] for row in blobs if row[1] == what)
        flip(lease.path, lease.offset_bytes + offset + 3)
        yield job
        flip(lease.path, lease.offset_bytes + offset + 3)
        return
    if what in ("json", "safetensors"):
        (path,) = folder.glob(f"record-*.{what}")
        flip(path, path.stat().st_size // 2)
    elif what == "ranks":
        rewritten(job, lambda body: body["facts"].update(ranks=2))
    elif what == "leases":
        rewritten(job, lambda body: body["facts"].update(leases=[]))
    elif what == "step":
        rewritten(job, lambda body: body.update(step=2))
    elif what == "rows":
        rewritten(job, lambda body: body.update(rows="others"))
    elif what == "slot":
        rewritten(job, lambda body: body["blobs"].append(body["blobs"][0]))
    else:
        job = replace(job, plan=replace(job.plan, cuts=replace(job.plan.cuts, token_tile=4)))
    yield job


def _bodies(folder: Path) -> Iterator[dict[str, Any]]:
    files = RecordFiles(folder)
    for number in files.numbers():
        yield files.read(number).body


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("host", "checksum"),
        ("ssd", "checksum"),
        ("json", r"record-\d+\.json: "),
        ("safetensors", "digest"),
        ("plan", "other facts: plan"),
        ("ranks", "other facts: ranks"),
        ("leases", "other facts: leases"),
        ("step", "is one of step 3"),
        ("rows", "other rows"),
        ("slot", "or it has the blob"),
    ],
)
def test_what_cannot_be_trusted_makes_the_step_restart(
    ended, ended_leases, tmp_path: Path, what: str, said: str
) -> None:
    shutil.copytree(ended.run_dir, tmp_path / "run")
    with damaged(replace(ended, run_dir=str(tmp_path / "run")), ended_leases, what) as job:
        # It ends before it writes to a tier.
        with pytest.warns(UserWarning, match=f"step 2 restarts from its beginning: .*({said})"):
            again = process(job, ended_leases, 1, (1, 1, 1))
        assert again.places == [(1, 1, 1)]
        assert records(job) == []


def test_a_step_that_restarts_has_the_same_bits(chunk_job, leases, wanted) -> None:
    job = chunk_job()
    first = process(job, leases, 0, (1, 2, 3))
    with damaged(job, leases, "host"), pytest.warns(UserWarning, match="restarts"):
        again = process(job, leases, 1)
    assert again.places[0] == (1, 1, 1)
    assert "step_restarted" in again.events
    assert bits(job, first, again) == wanted


def test_the_planner_counts_the_slots_that_a_record_pins(chunk_job, leases, wanted) -> None:
    """And records change no bit."""
    job = chunk_job("chunk_ssd")
    found = process(job, leases, 0)
    shape = KvShape(job.model.num_layers, job.train.batch_size, 32, 2 * job.model.head_size, itemsize=4)
    one, two = (
        kv_bytes(shape, job.plan.cuts, job.plan.kv, job.plan.kv_grads, gradient_copies=copies).slots[Medium.ssd]
        for copies in (1, 2)
    )
    assert one < found.peaks["ssd"] <= two
    assert bits(job, found) == wanted
