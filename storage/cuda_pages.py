"""CUDA's virtual memory management through the driver's own library: any driver since CUDA 10.2 has it."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import torch

from headrace.storage.core.errors import MachineError
from headrace.storage.device_pages import PageCounter, PagePool

HAS_VIRTUAL_MEMORY = 102  # CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED
OUT_OF_MEMORY = 2  # CUDA_ERROR_OUT_OF_MEMORY
PINNED, ON_DEVICE, READ_WRITE = 1, 1, 3


class _Location(ctypes.Structure):
    _fields_ = [("type", ctypes.c_int), ("id", ctypes.c_int)]


class _Kind(ctypes.Structure):
    """CUmemAllocationProp."""

    _fields_ = [
        ("type", ctypes.c_int),
        ("requested_handle_types", ctypes.c_int),
        ("location", _Location),
        ("windows_metadata", ctypes.c_void_p),
        ("compression", ctypes.c_ubyte),
        ("rdma_capable", ctypes.c_ubyte),
        ("usage", ctypes.c_ushort),
        ("reserved", ctypes.c_ubyte * 4),
    ]


class _Access(ctypes.Structure):
    """CUmemAccessDesc."""

    _fields_ = [("location", _Location), ("flags", ctypes.c_int)]


class CudaPages:
    """PageDriver of a CUDA device.

    Args:
        library: libcuda, loaded.
        index: of the device among those that this process sees.

    Raises:
        MachineError: the driver has no virtual memory management for the device.
    """

    def __init__(self, library: Any, index: int) -> None:
        self._library, self._index = library, index
        device, has = ctypes.c_int(), ctypes.c_int()
        self._call("cuDeviceGet", ctypes.byref(device), index)
        self._call("cuDeviceGetAttribute", ctypes.byref(has), HAS_VIRTUAL_MEMORY, device)
        if not has.value:
            raise MachineError("the device has no virtual memory management")
        place = _Location(ON_DEVICE, device.value)
        self._kind = _Kind(type=PINNED, location=place)
        self._access = _Access(place, READ_WRITE)
        granularity = ctypes.c_size_t()
        self._call("cuMemGetAllocationGranularity", ctypes.byref(granularity), ctypes.byref(self._kind), 0)
        self.page_bytes = granularity.value

    def reserve(self, num_bytes: int) -> int:
        """See PageDriver."""
        address = ctypes.c_uint64()
        size, zero = ctypes.c_size_t(num_bytes), ctypes.c_uint64(0)
        self._call("cuMemAddressReserve", ctypes.byref(address), size, ctypes.c_size_t(0), zero, zero)
        return address.value

    def free_range(self, address: int, num_bytes: int) -> None:
        """See PageDriver."""
        self._call("cuMemAddressFree", ctypes.c_uint64(address), ctypes.c_size_t(num_bytes))

    def create(self) -> int | None:
        """See PageDriver. What torch's allocator keeps for later is given back before the answer is no."""
        page = self._try_create()
        if page is None:
            torch.cuda.empty_cache()
            page = self._try_create()
        return page

    def destroy(self, page: int) -> None:
        """See PageDriver."""
        self._call("cuMemRelease", ctypes.c_uint64(page))

    def map(self, address: int, pages: list[int]) -> None:
        """See PageDriver."""
        size, zero = ctypes.c_size_t(self.page_bytes), ctypes.c_size_t(0)
        for number, page in enumerate(pages):
            at = ctypes.c_uint64(address + number * self.page_bytes)
            self._call("cuMemMap", at, size, zero, ctypes.c_uint64(page), ctypes.c_uint64(0))
        length = ctypes.c_size_t(len(pages) * self.page_bytes)
        self._call("cuMemSetAccess", ctypes.c_uint64(address), length, ctypes.byref(self._access), ctypes.c_size_t(1))

    def unmap(self, address: int, num_pages: int) -> None:
        """See PageDriver."""
        self._call("cuMemUnmap", ctypes.c_uint64(address), ctypes.c_size_t(num_pages * self.page_bytes))

    def wait(self) -> None:
        """See PageDriver."""
        torch.cuda.synchronize(self._index)

    def tensor(self, address: int, num_bytes: int) -> torch.Tensor:
        """See PageDriver. torch asks the driver for the device of the first address."""
        array = {"shape": (num_bytes,), "typestr": "|u1", "data": (address, False), "strides": None, "version": 3}
        return torch.as_tensor(SimpleNamespace(__cuda_array_interface__=array), device=f"cuda:{self._index}")

    def _try_create(self) -> int | None:
        page = ctypes.c_uint64()
        size = ctypes.c_size_t(self.page_bytes)
        code = self._library.cuMemCreate(ctypes.byref(page), size, ctypes.byref(self._kind), ctypes.c_uint64(0))
        if code == OUT_OF_MEMORY:
            return None
        self._check("cuMemCreate", code)
        return page.value

    def _call(self, name: str, *args: Any) -> None:
        self._check(name, getattr(self._library, name)(*args))

    def _check(self, name: str, code: int) -> None:
        if code != 0:
            raise MachineError(f"{name}: the CUDA driver answered with error {code}")


def open_pages(device: torch.device, counter: PageCounter | None) -> tuple[PagePool | None, str]:
    """The pages of a device and how keys and values are allocated, in words for the run's record.

    Returns:
        None where the device has no virtual memory: a plain allocation serves.
    """
    if device.type != "cuda":
        return None, f"plain: {device.type} memory needs no pages"
    index = torch.cuda.current_device() if device.index is None else device.index
    total = torch.cuda.get_device_properties(index).total_memory  # and the device's context exists from here on
    try:
        driver = CudaPages(ctypes.CDLL("libcuda.so.1"), index)
    except (OSError, AttributeError, MachineError) as error:
        return None, f"plain: {error}"
    return PagePool(driver, total, counter), f"pages of {driver.page_bytes >> 20} MiB, mapped as the row grows"
