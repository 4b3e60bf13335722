"""Memory that grows in place: the policy over a fake driver, and the calls of CUDA's driver against a fake library."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.helpers.fake_pages import PAGE, FakePages
from headrace.storage import cuda_pages
from headrace.storage.core.errors import DeviceBudgetExceeded, MachineError
from headrace.storage.cuda_pages import CudaPages, open_pages
from headrace.storage.device_pages import PagePool
from headrace.workers.memory.meter import DeviceMeter
from headrace.workers.memory.out_of_memory import is_out_of_memory


def test_an_arena_is_one_tensor_and_is_mapped_as_it_fills() -> None:
    driver = FakePages(10)
    arena = PagePool(driver, 8 * PAGE).arena()
    whole = arena.tensor(8 * PAGE)
    assert arena.num_mapped == 1, "torch asks for the device of its first address"
    arena.need(3 * PAGE + 1)
    assert (whole.data_ptr(), driver.num_behind(arena.address, 8 * PAGE)) == (arena.address, 4)
    whole[: 3 * PAGE] = 7
    arena.need(8 * PAGE)
    assert (whole[: 3 * PAGE] == 7).all()
    assert driver.num_left == 2


def test_pages_stay_mapped_until_another_arena_finds_the_device_full() -> None:
    driver = FakePages(6)
    pool = PagePool(driver, 6 * PAGE)
    first, second = pool.arena(), pool.arena()
    first.need(5 * PAGE)
    first.need(2 * PAGE)
    assert (first.num_mapped, driver.num_unmaps) == (5, 0)
    first.need(4 * PAGE)
    assert driver.num_maps == 5, "nothing is mapped again"
    second.need(2 * PAGE)
    assert (first.num_mapped, second.num_mapped, pool.num_pages) == (4, 2, 6)


def test_a_device_without_room_changes_nothing() -> None:
    driver = FakePages(4)
    pool = PagePool(driver, 8 * PAGE)
    first, second = pool.arena(), pool.arena()
    first.need(3 * PAGE)
    with pytest.raises(RuntimeError, match="need 2 pages of 4096 bytes, and the device has room for 1") as caught:
        second.need(2 * PAGE)
    assert is_out_of_memory(caught.value)
    assert (first.num_mapped, second.num_mapped, second.num_needed) == (3, 0, 0)
    second.need(PAGE)
    with pytest.raises(RuntimeError, match="out of memory"):
        first.need(9 * PAGE)


def test_the_budget_counts_pages_once_and_gives_them_back() -> None:
    meter = DeviceMeter(5 * PAGE)
    pool = PagePool(FakePages(9), 9 * PAGE, meter)
    first, second = pool.arena(), pool.arena()
    first.need(4 * PAGE)
    with pytest.raises(DeviceBudgetExceeded):
        second.need(2 * PAGE)
    assert meter.resident_bytes == 4 * PAGE
    first.need(0)
    second.need(PAGE)
    assert meter.resident_bytes == 5 * PAGE
    pool.close()
    pool.close()
    assert meter.resident_bytes == 0


def test_a_full_budget_is_no_reason_while_another_arena_holds_what_it_does_not_need() -> None:
    meter = DeviceMeter(5 * PAGE)
    pool = PagePool(FakePages(9), 9 * PAGE, meter)
    first, second = pool.arena(), pool.arena()
    first.need(4 * PAGE)
    first.need(2 * PAGE)
    second.need(3 * PAGE)  # two of the first arena, and one that the budget still allows
    assert (first.num_mapped, second.num_mapped, meter.resident_bytes) == (2, 3, 5 * PAGE)
    with pytest.raises(DeviceBudgetExceeded):
        second.need(4 * PAGE)
    assert (first.num_mapped, second.num_mapped) == (2, 3)


def test_a_device_smaller_than_its_budget_is_counted_as_it_is() -> None:
    meter = DeviceMeter(50 * PAGE)
    pool = PagePool(FakePages(3), 9 * PAGE, meter)
    with pytest.raises(RuntimeError, match="out of memory"):
        pool.arena().need(5 * PAGE)
    assert meter.resident_bytes == pool.num_pages * PAGE == 3 * PAGE


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 8)), max_size=30), st.integers(4, 30))
def test_no_needed_page_is_ever_taken(steps: list[tuple[int, int]], num_pages: int) -> None:
    driver = FakePages(num_pages)
    pool = PagePool(driver, 8 * PAGE)
    arenas = [pool.arena() for _ in range(4)]
    needed = [0] * 4
    for which, pages in steps:
        try:
            arenas[which].need(pages * PAGE)
            needed[which] = pages
        except RuntimeError:
            assert sum(needed) - needed[which] + pages > num_pages, "there was room"
        for arena, least in zip(arenas, needed, strict=True):
            assert driver.num_behind(arena.address, 8 * PAGE) == arena.num_mapped >= least
            assert driver.num_behind(arena.address, least * PAGE) == least, "mapped from the start, without a gap"
    pool.close()
    assert (driver.num_left, driver.ranges, driver.mapped) == (num_pages, {}, {})


class FakeLibrary:
    """libcuda: writes down what it is asked and answers with code 0."""

    def __init__(self, **codes: int) -> None:
        self.codes, self.calls = codes, []

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any) -> int:
            self.calls.append((name, *(getattr(arg, "value", arg) for arg in args)))
            out = {"cuMemGetAllocationGranularity": 2 << 20, "cuMemAddressReserve": 1 << 40, "cuMemCreate": 77}
            if name in out:
                args[0]._obj.value = out[name]
            if name == "cuDeviceGetAttribute":
                args[0]._obj.value = 1
            return self.codes.get(name, 0)

        return call


def test_the_calls_to_the_driver() -> None:
    library = FakeLibrary()
    driver = CudaPages(library, 0)
    assert driver.page_bytes == 2 << 20
    address = driver.reserve(6 << 20)
    pages = [driver.create(), driver.create()]
    driver.map(address, pages)
    driver.unmap(address, 2)
    driver.destroy(77)
    driver.free_range(address, 6 << 20)
    asked = [(name, *(a for a in args if isinstance(a, int))) for name, *args in library.calls[3:]]
    assert asked == [
        ("cuMemAddressReserve", 6 << 20, 0, 0, 0),
        ("cuMemCreate", 2 << 20, 0),
        ("cuMemCreate", 2 << 20, 0),
        ("cuMemMap", 1 << 40, 2 << 20, 0, 77, 0),
        ("cuMemMap", (1 << 40) + (2 << 20), 2 << 20, 0, 77, 0),
        ("cuMemSetAccess", 1 << 40, 4 << 20, 1),
        ("cuMemUnmap", 1 << 40, 4 << 20),
        ("cuMemRelease", 77),
        ("cuMemAddressFree", 1 << 40, 6 << 20),
    ]
    # Sizes of the driver's own header, 64 bit.
    assert (ctypes.sizeof(cuda_pages._Kind), ctypes.sizeof(cuda_pages._Access)) == (32, 12)


def test_a_full_device_gives_torchs_cache_back_first(monkeypatch: pytest.MonkeyPatch) -> None:
    library = FakeLibrary(cuMemCreate=2)
    driver = CudaPages(library, 0)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: library.codes.clear())
    assert driver.create() == 77


def test_an_error_of_the_driver_names_the_call() -> None:
    with pytest.raises(MachineError, match="cuMemGetAllocationGranularity: the CUDA driver answered with error 801"):
        CudaPages(FakeLibrary(cuMemGetAllocationGranularity=801), 0)


def test_a_cpu_has_a_plain_allocation() -> None:
    assert open_pages(torch.device("cpu"), None) == (None, "plain: cpu memory needs no pages")


@pytest.mark.gpu
def test_pages_of_a_gpu_hold_what_kernels_write() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    before, _ = torch.cuda.mem_get_info(device)
    pool, how = open_pages(device, None)
    assert pool is not None, how
    arena = pool.arena()
    arena.need(1)
    rows = arena.tensor(64 << 20).view(torch.float32)
    for number in range(32):
        arena.need((number + 1) * 2 << 20)
        rows[number << 19 : number + 1 << 19] = number
    assert torch.equal(rows.view(32, -1).mean(1).cpu(), torch.arange(32.0))
    pool.close()
    assert before - torch.cuda.mem_get_info(device)[0] < 32 << 20
