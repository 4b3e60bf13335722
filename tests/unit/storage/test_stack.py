"""The six verbs over real tiers: bit-equal, in order, and a named error for everything else."""

from __future__ import annotations

import os
import random
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from headrace.helpers.tiers import FakeTier, Faults, open_fake_stack
from headrace.storage.core.errors import InputError, TierFull, TransferFailed
from headrace.storage.core.keys import BlobKey
from headrace.storage.core.records import Direction, LookupResult, Medium
from headrace.storage.core.states import BlobState
from headrace.storage.stack import TierStack
from headrace.storage.transfer_log import TransferLog

MIB = 1024**2
KEY, OTHER = BlobKey("test", 1, "layer_input", 0, 1, 3), BlobKey("test", 2, "layer_input", 0, 1, 3)
BOTH = pytest.mark.parametrize("medium", [Medium.host, Medium.ssd], ids=lambda m: m.value)


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def there_and_back(stack: TierStack, tensor: torch.Tensor, medium: Medium) -> torch.Tensor:
    stack.prepare_store(KEY, tensor, medium)
    stack.complete_store(KEY)
    stack.prepare_load(KEY)
    back = stack.complete_load(KEY)
    stack.discard(KEY)
    return back


def nan_payloads() -> torch.Tensor:
    return torch.tensor([0x7FC00001, -0x400000, 0x7F800001, 0x00000001, -(2**31)], dtype=torch.int32).view(
        torch.float32
    )


TENSORS: dict[str, Callable[[], torch.Tensor]] = {
    "fp32": lambda: torch.randn(7, 333),
    "fp64": lambda: torch.randn(5, 5, dtype=torch.float64),
    "bf16": lambda: torch.randn(3, 1000).bfloat16(),
    "bf16 all bit patterns": lambda: torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16),
    "nan payloads": nan_payloads,
    "int64": lambda: torch.arange(-9, 9),
    "uint8 odd": lambda: torch.arange(4097, dtype=torch.int32).to(torch.uint8),
    "bool": lambda: torch.tensor([True, False, True]),
    "complex": lambda: torch.randn(3, 3, dtype=torch.complex64),
    "conjugated": lambda: torch.randn(3, 3, dtype=torch.complex64).conj(),
    "scalar": lambda: torch.tensor(2.5),
    "empty": lambda: torch.empty(0, 7, dtype=torch.bfloat16),
    "transposed": lambda: torch.randn(33, 65).t(),
    "every other row": lambda: torch.randn(64, 9)[::2],
    "expanded": lambda: torch.randn(1, 5).expand(4, 5),
    "unaligned view": lambda: torch.randn(1001)[1:],
    "many parts": lambda: torch.randn(MIB // 2 + 1234),
    "exactly one part": lambda: torch.randint(0, 255, (4 * MIB,), dtype=torch.uint8),
    "requires grad": lambda: torch.randn(5, requires_grad=True),
}


@BOTH
@pytest.mark.parametrize("name", TENSORS)
def test_what_comes_back_is_bit_equal(stack: TierStack, medium: Medium, name: str) -> None:
    tensor = TENSORS[name]()
    back = there_and_back(stack, tensor, medium)
    assert (back.dtype, back.shape, back.device) == (tensor.dtype, tensor.shape, tensor.device)
    assert raw(back) == raw(tensor.detach().resolve_conj())
    assert back.is_contiguous()
    assert not back.requires_grad
    assert back.untyped_storage().nbytes() == tensor.nbytes, "exactly its own bytes: the meter counts storages"


@BOTH
def test_inference_tensors_can_be_stored(stack: TierStack, medium: Medium) -> None:
    with torch.inference_mode():
        tensor = torch.randn(50)
    assert raw(there_and_back(stack, tensor, medium)) == raw(tensor.clone())


@BOTH
def test_states_and_answers_of_a_life(stack: TierStack, medium: Medium) -> None:
    tensor = torch.randn(1000)
    assert stack.lookup(KEY) is LookupResult.miss
    stack.prepare_store(KEY, tensor, medium)
    assert stack.state(KEY) is BlobState.storing
    stack.complete_store(KEY)
    assert (stack.state(KEY), stack.lookup(KEY)) == (BlobState.stored, LookupResult.hit)
    stack.prepare_load(KEY)
    assert (stack.state(KEY), stack.lookup(KEY)) == (BlobState.loading, LookupResult.hit)
    first = stack.complete_load(KEY)
    assert stack.state(KEY) is BlobState.stored
    stack.prepare_load(KEY)
    second = stack.complete_load(KEY)
    assert torch.equal(first, second)
    assert first.data_ptr() != second.data_ptr()
    stack.discard(KEY)
    assert stack.lookup(KEY) is LookupResult.miss


@BOTH
def test_the_source_may_change_after_complete_store(stack: TierStack, medium: Medium) -> None:
    tensor = torch.arange(5000.0)
    stack.prepare_store(KEY, tensor, medium)
    stack.complete_store(KEY)
    tensor.zero_()
    stack.prepare_load(KEY)
    assert torch.equal(stack.complete_load(KEY), torch.arange(5000.0))


@BOTH
def test_nothing_holds_the_source_after_complete_store(stack: TierStack, medium: Medium) -> None:
    """Else a tensor that left for a tier would take device memory until its backward."""
    tensor = torch.arange(500_000.0)
    freed = weakref.ref(tensor.untyped_storage())
    stack.prepare_store(KEY, tensor, medium)
    stack.complete_store(KEY)
    del tensor
    assert freed() is None
    assert stack.lookup(KEY) is LookupResult.hit


@BOTH
def test_a_change_in_place_before_complete_store_is_found(stack: TierStack, medium: Medium) -> None:
    tensor = torch.arange(5000.0)
    stack.prepare_store(KEY, tensor, medium)
    tensor.add_(1)
    with pytest.raises(TransferFailed, match=rf"{KEY}: the tensor was changed in place .* to the {medium.value} tier"):
        stack.complete_store(KEY)
    assert stack.lookup(KEY) is LookupResult.miss
    with pytest.raises(TransferFailed, match=f"{KEY}: the tensor was changed in place"):
        stack.prepare_load(KEY)
    with pytest.raises(RuntimeError, match=f"{KEY} is failed: prepare_store is not allowed, only discard"):
        stack.prepare_store(KEY, tensor, medium)
    stack.discard(KEY)
    assert stack.stats()[medium].used_bytes == 0


def test_a_change_through_a_view_is_found(stack: TierStack) -> None:
    tensor = torch.arange(5000.0)
    view = tensor.view(50, 100)
    stack.prepare_store(KEY, tensor, Medium.host)
    view[3] = 0
    with pytest.raises(TransferFailed, match="changed in place"):
        stack.complete_store(KEY)


def test_a_load_while_the_store_runs_is_answered_from_memory() -> None:
    tier = FakeTier(MIB, Faults(delay_s=0.2))
    log = TransferLog()
    stack = open_fake_stack([tier], log=log)
    tensor = torch.randn(100)
    stack.prepare_store(KEY, tensor, Medium.ssd)
    assert stack.lookup(KEY) is LookupResult.pending
    stack.prepare_load(KEY)
    assert stack.complete_load(KEY) is not None
    stack.prepare_load(KEY)
    assert stack.complete_load(KEY).data_ptr() == tensor.data_ptr()
    assert stack.exposed_s < 0.1, "nobody waited for the drive"
    stack.complete_store(KEY)
    assert [r.direction for r in log.records] == [Direction.store], "no bytes came back"
    found = stack.record()["tiers"]["ssd"]
    assert (found["forwarded_blobs"], found["forwarded_bytes"], found["loaded_bytes"]) == (2, 800, 0)
    assert log.forwarded_bytes == {Medium.ssd: 800}
    stack.close()


def test_a_forwarded_tensor_changed_in_place_is_found() -> None:
    stack = open_fake_stack([FakeTier(MIB, Faults(delay_s=0.2))])
    tensor = torch.randn(100)
    stack.prepare_store(KEY, tensor, Medium.ssd)
    stack.prepare_load(KEY)
    tensor.zero_()
    with pytest.raises(TransferFailed, match="changed in place"):
        stack.complete_load(KEY)
    stack.close()


def test_a_tier_without_a_lease_is_off(host_slab, log: TransferLog) -> None:
    stack = open_fake_stack([FakeTier(MIB, medium=Medium.host)])
    with pytest.raises(TierFull, match=rf"ssd tier is off: blob {KEY} needs 20 bytes .*tiers\.ssd\.budget_gib above 0"):
        stack.prepare_store(KEY, torch.randn(5), Medium.ssd)
    assert stack.lookup(KEY) is LookupResult.miss
    with pytest.raises(ValueError, match="hbm"):
        stack.prepare_store(KEY, torch.randn(5), Medium.hbm)
    stack.close()


def test_a_full_tier_says_so_and_stays_usable(stack: TierStack) -> None:
    stack.prepare_store(KEY, torch.zeros(3 * MIB, dtype=torch.uint8), Medium.host)
    stack.complete_store(KEY)
    with pytest.raises(TierFull, match=rf"host tier is full: blob {OTHER} needs {2 * MIB} bytes, {MIB} of"):
        stack.prepare_store(OTHER, torch.zeros(2 * MIB, dtype=torch.uint8), Medium.host)
    assert stack.lookup(OTHER) is LookupResult.miss
    stack.discard(KEY)
    stack.prepare_store(OTHER, torch.zeros(4 * MIB, dtype=torch.uint8), Medium.host)
    stack.complete_store(OTHER)


def test_misuse_is_told_apart_from_failure(stack: TierStack) -> None:
    tensor = torch.randn(10)
    assert stack.state(KEY) is BlobState.absent
    for verb in (stack.complete_store, stack.prepare_load, stack.complete_load, stack.discard):
        with pytest.raises(KeyError, match=f"{KEY} is absent: {verb.__name__}"):
            verb(KEY)
    stack.prepare_store(KEY, tensor, Medium.host)
    with pytest.raises(RuntimeError, match=f"{KEY} is storing: prepare_store"):
        stack.prepare_store(KEY, tensor, Medium.ssd)
    stack.complete_store(KEY)
    with pytest.raises(RuntimeError, match=f"{KEY} is stored: complete_store"):
        stack.complete_store(KEY)
    with pytest.raises(RuntimeError, match=f"{KEY} is stored: complete_load"):
        stack.complete_load(KEY)
    stack.prepare_load(KEY)
    with pytest.raises(RuntimeError, match=f"{KEY} is loading: prepare_load"):
        stack.prepare_load(KEY)
    stack.complete_load(KEY)
    with pytest.raises(InputError, match="sparse"):
        stack.prepare_store(OTHER, torch.eye(3).to_sparse(), Medium.host)
    with pytest.raises(InputError, match="is on meta, the tiers serve cpu"):
        stack.prepare_store(OTHER, torch.empty(3, device="meta"), Medium.host)


@pytest.mark.parametrize("when", ["storing", "stored", "loading", "loaded"])
def test_discard_at_any_time_gives_the_slot_back(when: str) -> None:
    tier = FakeTier(MIB, Faults(delay_s=0.05))
    stack = open_fake_stack([tier])
    tensor = torch.randn(1000)
    stack.prepare_store(KEY, tensor, Medium.ssd)
    if when != "storing":
        stack.complete_store(KEY)
    if when in ("loading", "loaded"):
        stack.prepare_load(KEY)
    if when == "loaded":
        stack.complete_load(KEY)
    stack.discard(KEY)
    assert stack.lookup(KEY) is LookupResult.miss
    # The name is free at once, the slot when the transfer has ended.
    stack.prepare_store(KEY, tensor + 1, Medium.ssd)
    stack.complete_store(KEY)
    stack.prepare_load(KEY)
    assert torch.equal(stack.complete_load(KEY), tensor + 1)
    stack.discard(KEY)
    for opened in stack._tiers.values():
        opened.threads.close()
    assert stack.stats()[Medium.ssd].used_bytes == 0
    stack.close()


def test_the_bytes_of_the_log_and_of_the_stats_are_those_of_the_tensors(stack: TierStack, log: TransferLog) -> None:
    sizes = {Medium.host: 0, Medium.ssd: 0}
    for layer in range(6):
        medium = Medium.host if layer % 2 else Medium.ssd
        tensor = torch.randn(1000 + layer, 7)
        sizes[medium] += tensor.nbytes
        key = BlobKey("test", layer, "x", 0, 1, 0)
        stack.prepare_store(key, tensor, medium)
        stack.complete_store(key)
        stack.prepare_load(key)
        stack.complete_load(key)
    stats = stack.stats()
    for medium, num_bytes in sizes.items():
        assert (stats[medium].stored_bytes, stats[medium].loaded_bytes) == (num_bytes, num_bytes)
        assert log.moved_bytes[medium, Direction.store] == log.moved_bytes[medium, Direction.load] == num_bytes
        assert stats[medium].used_bytes == stats[medium].peak_bytes >= num_bytes
        assert stats[medium].store_busy_s > 0
        assert stats[medium].load_busy_s > 0
    assert len(log.records) == 12
    assert all(r.submit_s <= r.start_s <= r.end_s for r in log.records)
    for layer in range(6):
        stack.discard(BlobKey("test", layer, "x", 0, 1, 0))
    stack.reset_peaks()
    assert all((s.used_bytes, s.peak_bytes) == (0, 0) for s in stack.stats().values())


def test_time_in_the_verbs_is_metered() -> None:
    stack = open_fake_stack([FakeTier(MIB, Faults(delay_s=0.05))])
    stack.prepare_store(KEY, torch.randn(10), Medium.ssd)
    assert stack.exposed_s < 0.04
    stack.complete_store(KEY)
    after_store_s = stack.exposed_s
    assert after_store_s >= 0.04
    stack.prepare_load(KEY)
    stack.complete_load(KEY)
    assert stack.exposed_s >= after_store_s + 0.04
    stack.close()


def test_back_pressure_instead_of_growth() -> None:
    stack = open_fake_stack([FakeTier(MIB, Faults(delay_s=0.02))], num_threads=1, window_bytes=80)
    for layer in range(8):
        stack.prepare_store(BlobKey("test", layer, "x", 0, 1, 0), torch.randn(10), Medium.ssd)
    assert stack.exposed_s > 0.02
    for layer in range(8):
        stack.complete_store(BlobKey("test", layer, "x", 0, 1, 0))
    stack.close()


def test_close_in_the_middle_and_twice(stack: TierStack) -> None:
    stack.prepare_store(KEY, torch.randn(MIB), Medium.ssd)
    stack.close()
    stack.close()
    with pytest.raises(RuntimeError, match="closed"):
        stack.prepare_load(KEY)


def test_a_forked_child_is_refused(stack: TierStack) -> None:
    stack.prepare_store(KEY, torch.randn(10), Medium.host)
    stack.complete_store(KEY)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        try:
            stack.prepare_load(KEY)
        except RuntimeError as error:
            os._exit(0 if "spawn" in str(error) else 1)
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_one_tier_per_medium() -> None:
    with pytest.raises(ValueError, match="one tier per medium"):
        open_fake_stack([FakeTier(MIB), FakeTier(MIB)])


class Traffic:
    """Random legal verbs on many blobs; every load is compared with what was stored."""

    def __init__(self, stack: TierStack, seed: int) -> None:
        self.stack, self.random = stack, random.Random(seed)
        self.blobs: dict[BlobKey, tuple[torch.Tensor, str]] = {}
        self.num_loads = 0

    def step(self, number: int) -> None:
        if not self.blobs or self.random.random() < 0.35:
            tensor = torch.randint(
                -(2**31), 2**31 - 1, (self.random.choice((0, 1, 1000, 5000, 9000)),), dtype=torch.int32
            )
            key = BlobKey("test", number, "x", 0, 1, 0)
            try:
                self.stack.prepare_store(key, tensor, self.random.choice((Medium.host, Medium.ssd)))
            except TierFull:
                return self.drop()
            self.blobs[key] = (tensor, "storing")
            return None
        key = self.random.choice(list(self.blobs))
        tensor, state = self.blobs[key]
        if state == "storing" and self.random.random() < 0.7:
            self.stack.complete_store(key)
            self.blobs[key] = (tensor, "stored")
        elif state == "loading":
            assert torch.equal(self.stack.complete_load(key), tensor)
            self.num_loads += 1
            self.blobs[key] = (tensor, "stored")
        elif state == "stored" and self.random.random() < 0.7:
            self.stack.prepare_load(key)
            self.blobs[key] = (tensor, "loading")
        elif self.random.random() < 0.2:
            self.drop(key)
        return None

    def drop(self, key: BlobKey | None = None) -> None:
        key = key or self.random.choice(list(self.blobs))
        self.stack.discard(key)
        del self.blobs[key]


def traffic(stack: TierStack, num_verbs: int) -> None:
    run = Traffic(stack, seed=5)
    for number in range(num_verbs):
        run.step(number)
    for key in list(run.blobs):
        run.drop(key)
    for opened in stack._tiers.values():
        opened.threads.close()
    assert run.num_loads > num_verbs // 20
    assert all(s.used_bytes == 0 for s in stack.stats().values())


def test_random_traffic_of_4_000_verbs(stack: TierStack) -> None:
    traffic(stack, 4_000)


@pytest.mark.soak
def test_random_traffic_of_100_000_verbs(stack: TierStack) -> None:
    traffic(stack, 100_000)


def test_the_log_can_be_written(stack: TierStack, log: TransferLog, tmp_path: Path) -> None:
    there_and_back(stack, torch.randn(10), Medium.ssd)
    log.write_parquet(tmp_path / "transfers.parquet")
    assert (tmp_path / "transfers.parquet").stat().st_size > 0
