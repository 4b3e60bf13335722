"""Counts the bytes that live on the device between forward and backward, and enforces the device budget.

On CPU the "device" is a number: the bytes of every tensor that autograd saved, plus what the memory policy itself
keeps there (layer inputs in flight, loads that arrived early). On CUDA the allocator knows, and enforces.
Both meters have one interface, so the engine does not ask which one it holds.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from types import TracebackType
from typing import Protocol

import torch
from torch import nn

from headrace.storage.core.errors import DeviceBudgetExceeded, InputError
from headrace.workers.memory.out_of_memory import is_out_of_memory

GIB = 1024**3


class Hold(Protocol):
    """A claim on device bytes; `release` gives it back and may be called twice."""

    def release(self) -> None:
        """Give the bytes back."""


class Meter(Protocol):
    """What the engine and the policy need of a meter. Bytes of one rank."""

    @property
    def peak_bytes(self) -> int:
        """Largest number of bytes resident at once since the last reset_peak."""

    def reset_peak(self) -> None:
        """Start a new peak from what is resident now."""

    def hold(self, tensor: torch.Tensor) -> Hold:
        """Count the tensor's storage until released, once with any other claim on the same storage."""

    def reserve(self, num_bytes: int) -> Hold:
        """Count bytes that have no tensor yet: an arena, or a load under way."""

    def beside(self, num_bytes: int) -> Hold:
        """Count bytes that torch's allocator does not know: pages of keys and values."""

    def work(self, num_bytes: int) -> Hold:
        """Count bytes that a block takes while it is at work, and until released nothing of what autograd saves."""

    def __enter__(self) -> Meter:
        """Start counting."""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """Stop counting; an exception passes through."""


class _Claim:
    """One reference to a counted storage (or to bare bytes). Dropping the object releases it."""

    __slots__ = ("_key", "_meter", "tensor", "version")

    def __init__(self, meter: DeviceMeter, key: int, tensor: torch.Tensor | None) -> None:
        self._meter: DeviceMeter | None = meter
        self._key = key
        # A detached alias keeps the storage alive, so its address cannot come to mean another one, and does not
        # keep the graph alive, which would be a cycle where an operation saves its own output.
        self.tensor = None if tensor is None else tensor.detach()
        self.version = 0 if tensor is None else tensor._version

    def release(self) -> None:
        """Give the bytes back."""
        meter, self._meter = self._meter, None
        if meter is not None:
            meter._drop(self._key)
            self.tensor = None

    def __del__(self) -> None:
        self.release()


class _Work:
    """A block's claim while it is at work."""

    def __init__(self, meter: DeviceMeter, hold: Hold) -> None:
        self._meter: DeviceMeter | None = meter
        self._hold = hold

    def release(self) -> None:
        """Give the bytes back; autograd's saved tensors count again."""
        meter, self._meter = self._meter, None
        if meter is not None:
            self._hold.release()
            meter._num_at_work -= 1


class DeviceMeter:
    """Meters saved tensors by storage identity: a storage counts once, whole, while autograd or the policy needs it.

    Parameters and views of them are not counted: they are there with or without a plan (under FSDP2 the unsharded
    parameter is an nn.Parameter too, in a storage of its own). Use as a context manager around forward and backward.

    Args:
        budget_bytes: of tensors kept between forward and backward, per rank; None meters without a limit.
        parameters: further tensors that do not count, such as buffers; kept alive by the meter.

    Raises:
        DeviceBudgetExceeded: from the operation that would pass the budget.
    """

    def __init__(self, budget_bytes: int | None = None, parameters: Iterable[torch.Tensor] = ()) -> None:
        if budget_bytes is not None and budget_bytes <= 0:
            raise InputError(f"tiers.device.budget_gib: {budget_bytes} bytes is no budget; leave it out or raise it")
        self.budget_bytes = budget_bytes
        self._skipped = {s._cdata: s for s in (_local(p).untyped_storage() for p in parameters)}
        self._resident_bytes = 0
        self._peak_bytes = 0
        self._claims: dict[int, list[int]] = {}
        self._num_reserved = self._num_at_work = 0
        # Re-entrant: a claim may be dropped by the garbage collector while this thread holds the lock.
        self._lock = threading.RLock()
        self._hooks: torch.autograd.graph.saved_tensors_hooks | None = None

    @property
    def resident_bytes(self) -> int:
        """Bytes counted now."""
        return self._resident_bytes

    @property
    def peak_bytes(self) -> int:
        """Largest number of bytes resident at once since the last reset_peak."""
        return self._peak_bytes

    def reset_peak(self) -> None:
        """Start a new peak from what is resident now."""
        with self._lock:
            self._peak_bytes = self._resident_bytes

    def hold(self, tensor: torch.Tensor) -> Hold:
        """Count the tensor's storage until released, once with any other claim on the same storage."""
        storage = tensor.untyped_storage()
        self._add(storage._cdata, storage.nbytes())
        return _Claim(self, storage._cdata, tensor)

    def reserve(self, num_bytes: int) -> Hold:
        """Count bytes that have no tensor yet: an arena, or a load under way."""
        with self._lock:
            self._num_reserved += 1
            key = -self._num_reserved  # addresses are positive
        self._add(key, num_bytes)
        return _Claim(self, key, None)

    def beside(self, num_bytes: int) -> Hold:
        """Count bytes that torch's allocator does not know."""
        return self.reserve(num_bytes)

    def work(self, num_bytes: int) -> Hold:
        """Count so many bytes until released, in place of what autograd saves meanwhile."""
        work = _Work(self, self.reserve(num_bytes))
        self._num_at_work += 1
        return work

    def __enter__(self) -> DeviceMeter:
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)
        self._hooks.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        hooks, self._hooks = self._hooks, None
        if hooks is not None:
            hooks.__exit__(kind, error, tb)

    def _pack(self, tensor: torch.Tensor) -> _Claim | torch.Tensor:
        if self._num_at_work or isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter):
            return tensor
        storage = _local(tensor).untyped_storage()
        if storage._cdata in self._skipped:
            return tensor
        self._add(storage._cdata, storage.nbytes())
        return _Claim(self, storage._cdata, tensor)

    def _unpack(self, packed: _Claim | torch.Tensor) -> torch.Tensor:
        if isinstance(packed, torch.Tensor):
            return packed
        tensor = packed.tensor
        assert tensor is not None, "autograd unpacks only what it still holds"
        # Hooks switch autograd's own check off, so it is made here.
        if tensor._version != packed.version:
            raise RuntimeError(
                "a tensor needed by the backward pass was modified in place after it was saved: "
                f"shape {tuple(tensor.shape)}, version {tensor._version}, saved at version {packed.version}"
            )
        return tensor

    def _add(self, key: int, num_bytes: int) -> None:
        with self._lock:
            claim = self._claims.get(key)
            if claim is not None:
                claim[0] += 1
                return
            wanted = self._resident_bytes + num_bytes
            if self.budget_bytes is not None and wanted > self.budget_bytes:
                raise over_budget(wanted, self.budget_bytes)
            self._claims[key] = [1, num_bytes]
            self._resident_bytes = wanted
            self._peak_bytes = max(self._peak_bytes, wanted)

    def _drop(self, key: int) -> None:
        with self._lock:
            claim = self._claims[key]
            claim[0] -= 1
            if claim[0] == 0:
                del self._claims[key]
                self._resident_bytes -= claim[1]


class _NoHold:
    """What a CUDA meter hands out: the allocator counts the bytes itself."""

    def release(self) -> None:
        """Nothing to give back."""


class _Beside:
    """Bytes past the allocator."""

    def __init__(self, meter: CudaMeter, num_bytes: int) -> None:
        self._meter, self._num_bytes = meter, num_bytes

    def release(self) -> None:
        """Give the bytes back."""
        num_bytes, self._num_bytes = self._num_bytes, 0
        self._meter._count_beside(-num_bytes)


class CudaMeter:
    """The same interface on a CUDA device: the caching allocator counts everything and enforces the budget.

    What is allocated past it (`beside`) is added, and taken from the allocator's share of the budget.

    Args:
        device: the rank's device.
        budget_bytes: of all memory of this process on the device; None leaves the device's own limit.
    """

    def __init__(self, device: torch.device, budget_bytes: int | None = None) -> None:
        self.device = device
        self.budget_bytes = budget_bytes
        self._beside_bytes = self._beside_peak = 0
        if budget_bytes is not None:
            total = torch.cuda.get_device_properties(device).total_memory
            if not 0 < budget_bytes <= total:
                raise InputError(
                    f"tiers.device.budget_gib={budget_bytes / GIB:.2f}: the device has {total / GIB:.2f} GiB; "
                    "choose a value between 0 and that, or leave it out"
                )
            torch.cuda.set_per_process_memory_fraction(budget_bytes / total, device)

    @property
    def peak_bytes(self) -> int:
        """Largest number of bytes allocated at once since the last reset_peak, weights and optimizer state included."""
        return int(torch.cuda.max_memory_allocated(self.device)) + self._beside_peak

    def reset_peak(self) -> None:
        """Start a new peak from what is allocated now."""
        torch.cuda.reset_peak_memory_stats(self.device)
        self._beside_peak = self._beside_bytes

    def hold(self, tensor: torch.Tensor) -> Hold:
        """The allocator already counts it."""
        return _NoHold()

    def reserve(self, num_bytes: int) -> Hold:
        """The allocator already counts it."""
        return _NoHold()

    def work(self, num_bytes: int) -> Hold:
        """The allocator already counts it."""
        return _NoHold()

    def beside(self, num_bytes: int) -> Hold:
        """Count bytes that torch's allocator does not know; its share of the budget shrinks by them.

        Raises:
            DeviceBudgetExceeded: the allocator already has more than the rest.
        """
        self._count_beside(num_bytes)
        return _Beside(self, num_bytes)

    def _count_beside(self, num_bytes: int) -> None:
        after = self._beside_bytes + num_bytes
        if self.budget_bytes is not None:
            rest = self.budget_bytes - after
            if torch.cuda.memory_reserved(self.device) > rest:
                torch.cuda.empty_cache()
            held = torch.cuda.memory_reserved(self.device)
            if num_bytes > 0 and held > rest:
                raise over_budget(held + after, self.budget_bytes)
            total = torch.cuda.get_device_properties(self.device).total_memory
            torch.cuda.set_per_process_memory_fraction(max(0, rest) / total, self.device)
        self._beside_bytes = after
        self._beside_peak = max(self._beside_peak, after)

    def __enter__(self) -> CudaMeter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self.budget_bytes is not None and error is not None and is_out_of_memory(error):
            raise over_budget(None, self.budget_bytes) from error


def open_meter(
    device: torch.device, budget_bytes: int | None = None, parameters: Iterable[torch.Tensor] = ()
) -> DeviceMeter | CudaMeter:
    """The meter of a device: CudaMeter on CUDA, DeviceMeter elsewhere. Arguments and errors as theirs."""
    if device.type == "cuda":
        return CudaMeter(device, budget_bytes)
    return DeviceMeter(budget_bytes, parameters)


def over_budget(wanted_bytes: int | None, budget_bytes: int) -> DeviceBudgetExceeded:
    """The error of a device that is full: what was wanted, what is there, what helps."""
    wanted = "more" if wanted_bytes is None else f"{wanted_bytes} bytes ({wanted_bytes / GIB:.3f} GiB)"
    return DeviceBudgetExceeded(
        f"device: {wanted} wanted, tiers.device.budget_gib={budget_bytes / GIB:.3f} gives {budget_bytes} bytes. "
        "Raise it, or choose memory=recompute, memory=offload_host or memory=auto, or lower data.seq_len"
    )


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """The local shard of a DTensor (FSDP2 parameters are such), any other tensor as it is."""
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()
