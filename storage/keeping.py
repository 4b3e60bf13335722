"""Blobs that outlive the process that stored them: where they lie, so that the next process takes them over.

The owner of a slab outlives a rank. The next rank is lent the same range, and nobody has written to it meanwhile. What
ended with the process is the table of slots. So it is exported as plain rows, the slots that it names are pinned until
there are newer rows, and the next process adopts the rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any

import torch

from headrace.storage.blockio.thread_pool import Job
from headrace.storage.core.keys import BlobKey
from headrace.storage.core.records import Medium
from headrace.storage.core.states import BlobState
from headrace.storage.form import Form
from headrace.storage.open_tier import OpenTier, SlotKey
from headrace.storage.table import NOTHING, Row, Transfer
from headrace.storage.tier import Blob, Move


@dataclass(frozen=True)
class StoredBlob:
    """One blob of a tier, in values that JSON has.

    Args:
        offset_bytes: of its slot within the tier's range.
        num_bytes: exact.
        digests: checksums of its parts, in order.
        dtype: as torch names it: "float32".
    """

    key: BlobKey
    medium: Medium
    offset_bytes: int
    num_bytes: int
    digests: tuple[int, ...]
    dtype: str
    shape: tuple[int, ...]

    @classmethod
    def of(cls, row: Row) -> StoredBlob:
        """A blob whose bytes are whole."""
        blob = row.blob
        digests = tuple(blob.digests[part] for part in range(row.tier.tier.num_parts(blob)))
        dtype, shape = name_of(row.form.dtype), tuple(row.form.shape)
        return cls(row.key, row.tier.tier.medium, blob.offset_bytes, blob.num_bytes, digests, dtype, shape)

    def to_json(self) -> list[Any]:
        """Lists, numbers and texts."""
        place = [self.medium.value, self.offset_bytes, self.num_bytes, list(self.digests)]
        return [list(self.key), *place, self.dtype, list(self.shape)]

    @classmethod
    def from_json(cls, row: Any) -> StoredBlob:
        """Inverse of to_json. Raises ValueError where it is something else."""
        try:
            (owner, layer, name, begin, end, step, micro_batch), medium, offset_bytes, num_bytes, *rest = row
            digests, dtype, shape = rest
            numbers = [layer, begin, end, micro_batch, offset_bytes, num_bytes, *digests, *shape]
            numbers += [] if step is None else [step]
            if not all(type(number) is int and number >= 0 for number in numbers):
                raise ValueError("not a number")
            if not all(isinstance(text, str) for text in (owner, name, dtype)):
                raise ValueError("not a text")
            key = BlobKey(owner, layer, name, begin, end, step, micro_batch)
            return cls(key, Medium(medium), offset_bytes, num_bytes, tuple(digests), dtype, tuple(shape))
        except (TypeError, ValueError) as error:
            raise ValueError(f"not the row of a blob ({error})") from error


class Pinned:
    """Blobs whose slots nothing else gets, also after they were discarded or replaced, until `release`.

    Args:
        slots: of these blobs.
        lock: the stack's.
    """

    def __init__(self, blobs: Sequence[StoredBlob], slots: Sequence[tuple[OpenTier, SlotKey]], lock: Lock) -> None:
        self.blobs = tuple(blobs)
        self._slots, self._lock = list(slots), lock
        with lock:
            for opened, slot_key in self._slots:
                opened.pin(slot_key)

    def release(self) -> None:
        """The slots are free when their blobs are gone. May be called twice."""
        slots, self._slots = self._slots, []
        with self._lock:
            for opened, slot_key in slots:
                opened.unpin(slot_key)


def adopted(stored: StoredBlob, slot_key: SlotKey, opened: OpenTier) -> Row:
    """The row of a blob that another process stored, with its slot. Under the stack's lock.

    Raises:
        ValueError: the row is not one of this range: the slot lies outside or is taken, or sizes do not agree.
    """
    form = Form(torch.Size(stored.shape), dtype_of(stored.dtype))
    blob = Blob(str(stored.key), stored.offset_bytes, stored.num_bytes, dict(enumerate(stored.digests)))
    if form.num_bytes != stored.num_bytes:
        raise ValueError(f"blob {stored.key}: its tensor has another size than {stored.num_bytes} bytes")
    if opened.tier.num_parts(blob) != len(stored.digests):
        raise ValueError(f"blob {stored.key}: {len(stored.digests)} checksums of {opened.tier.num_parts(blob)} parts")
    opened.ledger.prepare_at(slot_key, stored.offset_bytes, stored.num_bytes)
    job = Job(lambda part: None, 0)
    job.finish()
    store = Transfer(job, Move(blob, NOTHING, None), None, over=True)
    row = Row(slot_key, opened, blob, form, 0, state=BlobState.stored, store=store)
    row.settle()
    return row


def name_of(dtype: torch.dtype) -> str:
    """As torch names it: "float32"."""
    return str(dtype).removeprefix("torch.")


def dtype_of(name: str) -> torch.dtype:
    """Inverse of name_of. Raises ValueError for other names."""
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"{name} is no dtype")
    return found
