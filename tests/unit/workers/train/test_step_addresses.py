from __future__ import annotations

import ctypes
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from headrace.helpers.training import run_recorded, tiny_job
from headrace.storage.core.errors import InputError, MachineError
from headrace.workers.memory.addresses import Request, aligned
from headrace.workers.train import engine, step_addresses
from headrace.workers.train.config import Allocator
from headrace.workers.train.step_addresses import NUM_TRIES, StepAddresses, build, open_addresses

COMPUTE, SIDE = 7, 9  # streams
ARENA = 1 << 40
KIB = 1024
# Of a block: bytes, begin, end.
BLOCK = [(8 * KIB, 0, 3), (3 * KIB, 1, 2), (8 * KIB, 3, 6), (700, 4, 5), (8 * KIB, 7, 8)]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return build(tmp_path_factory.mktemp("compiled"))


class Device:
    """In place of a GPU and torch's allocator: addresses of a counter, and no two that are alive overlap."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.addresses = StepAddresses(library, self.new_arena, lambda: COMPUTE)
        self.events: list[str] = []
        self.addresses.note = lambda kind, text: self.events.append(kind)
        self.arenas: list[int] = []
        self.num_ordinary = 0
        self._library, self._next, self._held = library, 1 << 20, dict[int, int]()
        library.headrace_ask.restype = ctypes.c_uint64

    def new_arena(self, num_bytes: int) -> tuple[object, int]:
        self.arenas.append(num_bytes)
        return object(), ARENA

    def allocate(self, num_bytes: int, stream: int = COMPUTE) -> int:
        address = self._library.headrace_ask(ctypes.c_size_t(num_bytes), ctypes.c_void_p(stream))
        if address:
            assert address >= ARENA
            assert address + aligned(num_bytes) <= ARENA + self.arenas[-1]
        else:
            address, self._next = self._next, self._next + aligned(num_bytes)
            self.num_ordinary += 1
            made = ctypes.c_uint64(address), ctypes.c_size_t(num_bytes), ctypes.c_void_p(stream)
            self._library.headrace_made(*made)
        for other, size in self._held.items():
            assert address + num_bytes <= other or other + size <= address, "two that are alive overlap"
        self._held[address] = num_bytes
        return int(address)

    def free(self, address: int) -> None:
        del self._held[address]
        was_of_arena = self._library.headrace_gone(ctypes.c_uint64(address))
        assert bool(was_of_arena) == (address >= ARENA)

    def share(self, address: int) -> None:
        self._library.headrace_shared(ctypes.c_uint64(address))

    def step(self, requests: Sequence[Request]) -> int:
        """A step of these requests; those that went to the ordinary allocator."""
        self.num_ordinary, held = 0, dict[int, int]()
        ends = [(own.end, 0, number) for number, own in enumerate(requests)]
        begins = [(own.begin, 1, number) for number, own in enumerate(requests)]
        with self.addresses.step():
            for _, is_begin, number in sorted(ends + begins):
                if is_begin:
                    if number % len(BLOCK) == 0:
                        self.addresses.mark()
                    held[number] = self.allocate(requests[number].num_bytes)
                else:
                    self.free(held.pop(number))
        return self.num_ordinary


@pytest.fixture
def device(library: ctypes.CDLL) -> Device:
    return Device(library)


def blocks(num: int = 4) -> list[Request]:
    """Blocks one after the other."""
    return [Request(size, 10 * n + begin, 10 * n + end) for n in range(num) for size, begin, end in BLOCK]


def test_the_second_step_is_recorded_and_later_ones_are_served(device: Device) -> None:
    requests = blocks()
    found = [device.step(requests) for _ in range(5)]
    assert found == [len(requests)] * 2 + [0] * 3
    # No two of the large ones are alive at once but in the middle, where one ends as the other begins.
    assert device.arenas == [11 * KIB] * 3, "made for each step, of the bytes that are alive at once"
    assert device.events == []
    assert str(device.addresses) == (
        "20 of 20 requests of the last step served from an arena of 11264 bytes; 11264 bytes of them alive at once"
    )


@pytest.mark.parametrize(
    "change", ["another size", "one more", "one less"], ids=lambda change: change.replace(" ", "_")
)
def test_a_request_off_the_plan_is_told_and_the_plan_is_made_again(device: Device, change: str) -> None:
    requests = blocks()
    for _ in range(3):
        device.step(requests)
    changed = list(requests)
    if change == "another size":
        changed[6] = Request(5 * KIB, changed[6].begin, changed[6].end)
    elif change == "one more":
        changed.insert(6, Request(5 * KIB, changed[6].begin, changed[6].end))
    else:
        del changed[6]
    num_ordinary = device.step(changed)
    assert num_ordinary == (0 if change == "one less" else 1), "the others keep their addresses"
    assert device.events == ["addresses_replanned"]
    assert device.step(changed) == 0
    assert device.events == ["addresses_replanned"], "told once"


def test_steps_that_never_repeat_end_the_plan(device: Device) -> None:
    for number in range(2 + NUM_TRIES):
        device.step([*blocks(), Request((number + 1) * KIB, 100, 101)])
    assert device.events == ["addresses_replanned"] * (NUM_TRIES - 1) + ["addresses_dropped"]
    requests = blocks()
    assert device.step(requests) == len(requests)
    assert len(device.events) == NUM_TRIES


def test_whatever_the_order_nothing_overlaps(device: Device) -> None:
    """Frees and requests come in another order than the record has it; Device checks each address."""
    rng = random.Random(0)
    for number in range(40):
        if number % 8 == 0:
            device.addresses = StepAddresses(device._library, device.new_arena, lambda: COMPUTE)
        requests = blocks()
        if number % 8 > 1:
            for place in rng.sample(range(len(requests)), 5):
                own = requests[place]
                begin = own.begin + rng.randint(-4, 4)
                requests[place] = Request(own.num_bytes, begin, max(own.end, begin) + rng.randint(1, 9))
        device.step(requests)


def test_what_has_no_planned_address_stays_ordinary_and_is_not_off_the_plan(device: Device) -> None:
    """Memory of another stream, memory that another stream uses, and memory that outlives its step."""
    kept: list[int] = []
    for number in range(5):
        with device.addresses.step():
            device.num_ordinary = 0
            for address in kept:
                device.free(address)
            kept = [device.allocate(2 * KIB)]
            one, two, three = device.allocate(4 * KIB), device.allocate(4 * KIB, SIDE), device.allocate(6 * KIB)
            device.share(three)
            for address in (one, two, three):
                device.free(address)
        assert device.num_ordinary == (4 if number < 2 else 3)
    assert device.arenas == [4 * KIB] * 3
    assert device.events == []


def test_an_arena_in_use_stays(device: Device) -> None:
    requests = blocks()
    for _ in range(2):
        device.step(requests)
    with device.addresses.step():
        held = device.allocate(requests[0].num_bytes)
    assert device.events == ["addresses_replanned"]
    assert len(device.arenas) == 1
    num_ordinary = device.step(requests)
    assert num_ordinary > 0, "its place is taken"
    assert len(device.arenas) == 1, "the arena of the piece that is in use is still there"
    device.free(held)
    for _ in range(2):
        num_ordinary = device.step(requests)
    assert num_ordinary == 0
    assert len(device.arenas) > 1


def test_a_step_that_fails_changes_no_plan(device: Device) -> None:
    requests = blocks()
    for _ in range(2):
        device.step(requests)

    def fail() -> None:
        with device.addresses.step():
            device.free(device.allocate(requests[0].num_bytes))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert device.step(requests) == 0
    assert device.events == []


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"train.allocator=planned: needs CUDA and the run is on cpu; .* caching"):
        open_addresses(torch.device("cpu"))
    with pytest.raises(MachineError, match=r"cannot compile its file:\n.*\n(.*\n)*.*or set train.allocator=caching"):
        build(tmp_path, ["-DHEADRACE_TORCH=213", "-I/nowhere"])
    assert list(tmp_path.iterdir()) == [], "nothing half-made is left"
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(MachineError, match=r"no C\+\+ compiler; .* or set train.allocator=caching"):
        build(tmp_path)


def test_marks_are_of_the_record_and_take_no_address(library: ctypes.CDLL) -> None:
    records = np.array(
        [[-1, 0, -1, 0], [100, 1, 2, 1], [-1, 3, -1, 0], [100, 4, -1, 1], [600, 5, 6, 0]], dtype=np.int64
    )
    plan, found, live = step_addresses.plan_of_records(records)
    assert plan.tolist() == [[100, 0], [100, -1], [600, -1]]
    assert (found.arena_bytes, live) == (512, 512)


def test_a_run_records_its_blocks_and_tells_what_was_served(
    library: ctypes.CDLL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine on CPU, whose allocator asks for no addresses: marks alone come."""
    device, num_marks = Device(library), list[int]()
    monkeypatch.setattr(engine, "open_addresses", lambda on: device.addresses)
    plain = step_addresses.plan_of_records

    def seen(records: np.ndarray[Any, Any]) -> Any:
        num_marks.append(len(records))
        return plain(records)

    monkeypatch.setattr(step_addresses, "plan_of_records", seen)
    job = tiny_job(tmp_path, train={"steps": 3, "micro_batches": 2, "allocator": Allocator.planned})
    found = run_recorded(job).result
    assert num_marks == [2 * 2 * job.model.num_layers] * 2, "forward and backward of two micro-batches; not of step 1"
    assert found.stats["addresses"].startswith("0 of 0 requests")
