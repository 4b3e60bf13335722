"""The life of a blob: one state, and one table of what may follow. No torch.

A state says what the caller has begun and not yet completed. Whether all bytes are stored is a fact of the transfer.
storage/README.md draws the table.

`fail` leads to failed from every state, `discard` to absent. If a new blob fails, the blob that it replaces is there
again: `fall_back`.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType

from headrace.storage.core.keys import BlobKey


class BlobState(StrEnum):
    """The state of a blob between two verbs."""

    absent = "absent"  # not stored, or discarded
    storing = "storing"  # the stack holds the source, which answers loads
    forwarding = "forwarding"  # the same, and a load is open that the source answers
    stored = "stored"  # the caller has its source back
    loading = "loading"  # a load out of the tier is open
    failed = "failed"  # a transfer went wrong


class Verb(StrEnum):
    """What happens to a blob: the caller's verbs, and what the stack finds out while they run."""

    prepare_store = "prepare_store"
    complete_store = "complete_store"
    prepare_load = "prepare_load"
    complete_load = "complete_load"
    discard = "discard"
    fail = "fail"
    fall_back = "fall_back"


FOUND_OUT = (Verb.fail, Verb.fall_back)
_THERE = [state for state in BlobState if state is not BlobState.absent]

TRANSITIONS: Mapping[tuple[BlobState, Verb], BlobState] = MappingProxyType(
    {
        (BlobState.absent, Verb.prepare_store): BlobState.storing,
        (BlobState.stored, Verb.prepare_store): BlobState.storing,
        (BlobState.storing, Verb.complete_store): BlobState.stored,
        (BlobState.storing, Verb.prepare_load): BlobState.forwarding,
        (BlobState.forwarding, Verb.complete_load): BlobState.storing,
        (BlobState.stored, Verb.prepare_load): BlobState.loading,
        (BlobState.loading, Verb.complete_load): BlobState.stored,
        (BlobState.failed, Verb.fall_back): BlobState.stored,
        **{(state, Verb.fail): BlobState.failed for state in _THERE},
        **{(state, Verb.discard): BlobState.absent for state in _THERE},
    }
)


def after(key: BlobKey, state: BlobState, verb: Verb) -> BlobState:
    """The state that the verb leads to.

    Raises:
        KeyError: there is no blob of that name. RuntimeError: its state does not allow the verb. Both name key, state
            and verb.
    """
    found = TRANSITIONS.get((state, verb))
    if found is not None:
        return found
    allowed = ", ".join(may.value for it, may in TRANSITIONS if it is state and may not in FOUND_OUT)
    text = f"blob {key} is {state.value}: {verb.value} is not allowed, only {allowed}"
    raise KeyError(text) if state is BlobState.absent else RuntimeError(text)
