"""Blobs that the next process takes over: their slots are kept for them, their bytes compared, or nothing is taken."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from headrace.helpers.training import tiny_leases
from headrace.storage.build import open_stack
from headrace.storage.config import TiersConfig
from headrace.storage.core.errors import TransferFailed
from headrace.storage.core.keys import BlobKey
from headrace.storage.core.ledger import PAGE_BYTES, Ledger
from headrace.storage.core.records import Lease, LookupResult, Medium
from headrace.storage.keeping import StoredBlob
from headrace.storage.stack import TierStack
from headrace.storage.transfer_log import TransferLog

A, B, C = (BlobKey("chunks", layer, "dkv", 0, 8, 3, 1) for layer in range(3))
CPU = torch.device("cpu")


@pytest.fixture
def leases(tmp_path: Path) -> Iterator[tuple[Lease, ...]]:
    with tiny_leases(tmp_path) as per_rank:
        yield per_rank[0]


def opened(leases: tuple[Lease, ...]) -> Any:
    return closing(open_stack(leases, TiersConfig(), device=CPU, log=TransferLog()))


def store(stack: TierStack, key: BlobKey, tensor: torch.Tensor, medium: Medium) -> None:
    stack.prepare_store(key, tensor, medium)
    stack.complete_store(key)


def load(stack: TierStack, key: BlobKey) -> torch.Tensor:
    stack.prepare_load(key)
    return stack.complete_load(key)


def sent(blobs: tuple[StoredBlob, ...]) -> list[StoredBlob]:
    return [StoredBlob.from_json(row) for row in json.loads(json.dumps([blob.to_json() for blob in blobs]))]


@pytest.mark.parametrize("medium", [Medium.host, Medium.ssd])
def test_a_pinned_slot_outlives_its_blob(leases, medium: Medium) -> None:
    one, two = torch.arange(5000.0), torch.arange(5000.0) + 1
    with opened(leases) as stack:
        store(stack, A, one, medium)
        pinned = stack.pin([A])
        store(stack, A, two, medium)  # replaced: the new bytes lie elsewhere
        again = stack.pin([A])
        stack.discard(A)
        store(stack, B, two + 1, medium)
        used = stack.stats()[medium].used_bytes
        assert used == 3 * 5 * PAGE_BYTES
        offsets = {blob.offset_bytes for each in (pinned, again, stack.pin([B])) for blob in each.blobs}
        assert len(offsets) == 3
        pinned.release()
        pinned.release()
        assert stack.stats()[medium].used_bytes == used - 5 * PAGE_BYTES
        with opened(leases) as other, pytest.raises(ValueError, match="or it has the blob"):
            other.adopt([*again.blobs, *again.blobs])


def test_the_next_process_has_the_same_bits(leases) -> None:
    tensors = {A: torch.randn(2, 1, 8, 2, 300), B: torch.randn(77).bfloat16(), C: torch.randn(3, dtype=torch.float64)}
    places = {A: Medium.ssd, B: Medium.host, C: Medium.ssd}
    with opened(leases) as stack:
        for key, tensor in tensors.items():
            store(stack, key, tensor, places[key])
        blobs = stack.pin(tensors).blobs
    with opened(leases) as stack:
        pinned = stack.adopt(sent(blobs))
        assert pinned.blobs == tuple(sorted(blobs, key=lambda blob: (blob.medium, blob.offset_bytes)))
        for key, tensor in tensors.items():
            assert torch.equal(load(stack, key), tensor)
        held = stack.stats()[Medium.ssd].used_bytes
        stack.discard(A)
        assert stack.stats()[Medium.ssd].used_bytes == held, "the slot of the record is not used again"
        store(stack, A, tensors[A] + 1, Medium.ssd)
        pinned.release()
        for key in tensors:
            stack.discard(key)
        assert all(stats.used_bytes == 0 for stats in stack.stats().values())


@pytest.mark.parametrize("medium", [Medium.host, Medium.ssd])
def test_a_blob_that_was_changed_is_found_and_nothing_is_taken(leases, medium: Medium) -> None:
    with opened(leases) as stack:
        store(stack, A, torch.randn(5000), medium)
        store(stack, B, torch.randn(5000), medium)
        blobs = stack.pin([A, B]).blobs
        store(stack, C, torch.randn(100), medium)
    (lease,) = (lease for lease in leases if lease.medium is medium)
    with open(lease.path, "r+b") as file:
        file.seek(lease.offset_bytes + blobs[1].offset_bytes + 19999)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 1]))
    with opened(leases) as stack:
        with pytest.raises(TransferFailed, match=r"l1\.dkv.*checksum"):
            stack.adopt(blobs)
        assert stack.lookup(A) is LookupResult.miss
        assert stack.stats()[medium].used_bytes == 0


@pytest.mark.parametrize(
    "change",
    [
        lambda row: row.pop(),
        lambda row: row[0].pop(),
        lambda row: row[0].__setitem__(1, -1),
        lambda row: row[0].__setitem__(5, 2.0),
        lambda row: row[0].__setitem__(0, 7),
        lambda row: row.__setitem__(1, "tape"),
        lambda row: row.__setitem__(2, True),
        lambda row: row.__setitem__(6, ["8"]),
        lambda row: row.__setitem__(5, 5),
    ],
)
def test_what_is_no_row_is_refused(change: Any) -> None:
    row = StoredBlob(A, Medium.host, 4096, 32, (17,), "float32", (8,)).to_json()
    assert StoredBlob.from_json(row).to_json() == row
    change(row)
    with pytest.raises(ValueError, match="not the row of a blob"):
        StoredBlob.from_json(row)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"offset_bytes": 1 << 20}, "no free slot"),
        ({"offset_bytes": 100}, "no free slot"),
        ({"num_bytes": 36}, "another size"),
        ({"digests": ()}, "0 checksums of 1 parts"),
        ({"dtype": "Tensor"}, "no dtype"),
    ],
)
def test_a_blob_without_a_place_here_is_refused(leases, fields: dict[str, Any], said: str) -> None:
    blob = {"offset_bytes": 4096, "num_bytes": 32, "digests": (17,), "dtype": "float32", "shape": (8,)} | fields
    with opened(leases) as stack, pytest.raises(ValueError, match=said):
        stack.adopt([StoredBlob(A, Medium.host, **blob)])


def test_slots_at_given_places_and_the_holes_between() -> None:
    table = Ledger("host", 8 * PAGE_BYTES)
    table.prepare_at("a", 2 * PAGE_BYTES, PAGE_BYTES)
    table.prepare_at("b", 5 * PAGE_BYTES, 2 * PAGE_BYTES - 1)
    for offset in (2, 4, 6, 8):
        with pytest.raises(ValueError, match="no free slot"):
            table.prepare_at("c", offset * PAGE_BYTES, 2 * PAGE_BYTES)
    table.check()
    assert table.prepare("c", PAGE_BYTES).offset_bytes == 7 * PAGE_BYTES
    assert table.prepare("d", 2 * PAGE_BYTES).offset_bytes == 0
    table.free("a")
    table.check()
    assert table.largest_hole_bytes == 3 * PAGE_BYTES
