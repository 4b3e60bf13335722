"""A file system whose server errs, hangs and dies: what a network mount does, seen from a training step."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch

from headrace.storage.build import open_stack
from headrace.storage.config import SsdTierConfig, TiersConfig
from headrace.storage.core.errors import TransferFailed
from headrace.storage.core.keys import BlobKey
from headrace.storage.core.records import Lease, LookupResult, Medium
from headrace.storage.stack import TierStack
from headrace.storage.transfer_log import TransferLog

MIB = 1024**2
KEY, NEXT = BlobKey("test", 1, "layer_input", 0, 1, 3), BlobKey("test", 2, "layer_input", 0, 1, 3)
Running = Callable[..., AbstractContextManager[TierStack]]


@pytest.fixture
def running(fuse_mount: Any) -> Running:
    """Opens a stack over the mount's file, with O_DIRECT."""

    @contextmanager
    def run(*, checksum: bool = True) -> Iterator[TierStack]:
        lease = Lease(1, "rank0", Medium.ssd, str(fuse_mount.slab), 0, 32 * MIB, direct=True)
        config = TiersConfig(checksum=checksum, ssd=SsdTierConfig(timeout_s=30.0))
        stack = open_stack([lease], config, device=torch.device("cpu"), log=TransferLog())
        try:
            yield stack
        finally:
            stack.close()

    return run


def store(stack: TierStack, key: BlobKey = KEY) -> torch.Tensor:
    tensor = torch.randint(0, 256, (6 * MIB + 100,), dtype=torch.uint8)
    stack.prepare_store(key, tensor, Medium.ssd)
    stack.complete_store(key)
    return tensor


def load(stack: TierStack, key: BlobKey = KEY) -> torch.Tensor:
    stack.prepare_load(key)
    return stack.complete_load(key)


def record(stack: TierStack) -> dict[str, Any]:
    return stack.record()["tiers"]["ssd"]


@pytest.mark.parametrize("mode", ["ok", "short"])
def test_nothing_is_wrong(fuse_mount: Any, running: Running, mode: str) -> None:
    fuse_mount.set_mode(mode)
    with running() as stack:
        assert torch.equal(store(stack), load(stack))
        assert record(stack)["retries"] == 0


def test_an_error_that_passes_is_tried_again(fuse_mount: Any, running: Running) -> None:
    with running() as stack:
        fuse_mount.set_mode("eio 1")
        tensor = store(stack)
        assert record(stack)["retries"] == 1
        assert record(stack)["last_error"]["verb"] == "write"
        fuse_mount.set_mode("eio 2")
        assert torch.equal(load(stack), tensor)
        assert record(stack)["retries"] > 1
        assert record(stack)["last_error"]["verb"] == "read"


def test_an_error_that_stays_is_named(fuse_mount: Any, running: Running) -> None:
    place = rf"of {fuse_mount.slab} at offset \d+ failed: Input/output error in each of 3 tries; the drive fails"
    with running() as stack:
        kept = store(stack)
        fuse_mount.set_mode("eio")
        with pytest.raises(TransferFailed, match=f"{NEXT}: write {place}"):
            store(stack, NEXT)
        stack.discard(NEXT)
        with pytest.raises(TransferFailed, match=f"{KEY}: read {place}"):
            load(stack)
        assert stack.lookup(KEY) is LookupResult.miss
        stack.discard(KEY)
        assert stack.stats()[Medium.ssd].used_bytes == 0
        fuse_mount.set_mode("ok")
        assert torch.equal(store(stack), load(stack)), "the stack goes on"
        assert kept is not None


def test_a_wrong_bit_is_found(fuse_mount: Any, running: Running) -> None:
    with running() as stack:
        store(stack)
        fuse_mount.set_mode("flip")
        with pytest.raises(TransferFailed, match=rf"{KEY} in {fuse_mount.slab} at offset \d+: .*the bytes changed"):
            load(stack)
    with running(checksum=False) as stack:
        fuse_mount.set_mode("ok")
        tensor = store(stack)
        fuse_mount.set_mode("flip")
        assert not torch.equal(load(stack), tensor), "it is the checksum that finds it"


def test_a_server_that_dies_is_a_mount_that_is_gone(fuse_mount: Any, running: Running) -> None:
    with running() as stack:
        store(stack)
        fuse_mount.vanish()
        gone = rf"of {fuse_mount.slab} at offset \d+ failed: Transport endpoint is not connected; the mount is gone"
        with pytest.raises(TransferFailed, match=f"{NEXT}: write {gone}"):
            store(stack, NEXT)
        with pytest.raises(TransferFailed, match=f"{KEY}: read {gone}"):
            load(stack)
        for key in (KEY, NEXT):
            stack.discard(key)
        assert stack.stats()[Medium.ssd].used_bytes == 0
        assert record(stack)["last_error"]["errno"] == "ENOTCONN"
    with pytest.raises(TransferFailed, match=rf"{fuse_mount.slab} cannot be opened: .*the mount is gone"):
        with running():
            pass


def test_a_server_that_hangs_is_a_drive_that_does_not_answer(fuse_mount: Any, running: Running) -> None:
    before = set(threading.enumerate())
    with running() as stack:
        store(stack)
        fuse_mount.set_mode("hang")
        for opened in stack._tiers.values():
            opened.threads.stall_s = 0.5  # not before: a busy machine may take that long for the store
        with pytest.raises(TransferFailed, match=rf"{KEY}: ssd tier: no byte has moved for .* does not answer"):
            load(stack)
    ours = {thread for thread in set(threading.enumerate()) - before if thread.name.startswith("ssd-io")}
    assert ours, "the stack closes while its threads sit in the kernel"
    fuse_mount.vanish()
    deadline_s = time.monotonic() + 600
    while any(thread.is_alive() for thread in ours):
        assert time.monotonic() < deadline_s, "threads that hung have not ended"
        time.sleep(0.05)
