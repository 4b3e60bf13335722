"""Memory for load targets is used again, exactly when the last tensor on it is gone."""

from __future__ import annotations

import gc

import torch

from headrace.storage.transfer import WARM_BYTES, CpuCopies
from headrace.storage.warm_memory import WarmMemory

MIB = 1024**2


def test_freed_memory_comes_back_and_is_handed_out_again() -> None:
    warm = WarmMemory()
    first = warm.take(3 * MIB + 5)
    address = first.data_ptr()
    view = first[MIB:].view(2 * MIB + 5)
    del first
    assert warm.waiting_bytes == 0, "a view still uses it"
    del view
    gc.collect()
    assert warm.waiting_bytes == 3 * MIB + 4096
    again = warm.take(3 * MIB + 5)
    assert again.data_ptr() == address
    assert again.untyped_storage().nbytes() == 3 * MIB + 5


def test_two_that_live_at_once_share_nothing() -> None:
    warm = WarmMemory()
    one, two = warm.take(2 * MIB).fill_(1), warm.take(2 * MIB).fill_(2)
    assert int(one.max()) == 1
    assert int(two.min()) == 2


def test_what_waits_is_never_more_than_was_out_at_once() -> None:
    warm = WarmMemory()
    for size in range(1, 9):
        warm.take(size * MIB)
        assert warm.waiting_bytes <= 8 * MIB
    assert warm.waiting_bytes == 8 * MIB, "the latest stays, the others went"


def test_a_tensor_that_outlives_its_pool() -> None:
    warm = WarmMemory()
    tensor = warm.take(MIB).fill_(7)
    del warm
    assert int(tensor.sum()) == 7 * MIB
    del tensor


def test_targets_have_dtype_and_shape() -> None:
    copies = CpuCopies(torch.device("cpu"))
    for shape in ((1024, 1024), (3, 1), (0, 5), ()):
        target = copies.target(torch.Size(shape), torch.bfloat16)
        assert target.shape == shape
        assert target.dtype is torch.bfloat16
        assert target.untyped_storage().nbytes() == target.nbytes
    assert copies.target(torch.Size([WARM_BYTES // 4, 2]), torch.float32).is_contiguous()
