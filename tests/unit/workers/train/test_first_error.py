"""Whatever fails in a step, its own text reaches the caller: not "completed twice", not what a clean-up met later."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch.distributed as dist

from headrace.helpers.tiers import has_id
from headrace.storage.blockio.direct_file import DirectFile
from headrace.storage.core.errors import ErrorId, TransferFailed
from headrace.storage.stack import TierStack
from headrace.storage.transfer_log import TransferLog
from headrace.workers.data.loader import TokenLoader
from headrace.workers.train import session
from headrace.workers.train.engine import TrainEngine
from headrace.workers.train.gauges import StepGauges

VERBS = ("prepare_store", "complete_store", "prepare_load", "complete_load", "discard")
CLEAN_UPS = [
    (TierStack, "close"),
    (TierStack, "discard"),
    (TransferLog, "close"),
    (session, "write_or_warn"),
    (TokenLoader, "close"),
    (TrainEngine, "close"),
    (StepGauges, "close"),
    (dist, "destroy_process_group"),
]


def break_after(patch: pytest.MonkeyPatch, owner: Any, name: str, error: Callable[[], Exception], *, num: int) -> None:
    """From call number `num` on, the function does its work and raises."""
    real, calls = getattr(owner, name), [0]

    def broken(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        result = real(*args, **kwargs)
        if calls[0] > num:
            raise error()
        return result

    patch.setattr(owner, name, broken)


@pytest.mark.parametrize("num", [pytest.param(0, marks=pytest.mark.soak), 5])
@pytest.mark.parametrize("verb", VERBS)
def test_an_error_of_a_verb_keeps_its_text(verb: str, num: int, job, run_job, leases, monkeypatch) -> None:
    break_after(monkeypatch, TierStack, verb, lambda: TransferFailed(f"{verb} met a bad block"), num=num)
    with pytest.raises(TransferFailed) as caught:
        run_job(job(memory="offload_ssd"), leases=leases)
    assert str(caught.value) == f"{verb} met a bad block"


@pytest.mark.parametrize(("owner", "name"), CLEAN_UPS)
def test_an_error_keeps_its_text_through_a_clean_up_that_fails(
    owner: Any, name: str, job, run_job, leases, monkeypatch
) -> None:
    monkeypatch.setattr(TierStack, "complete_load", lambda self, key: fail(TransferFailed("the first error")))
    break_after(monkeypatch, owner, name, lambda: RuntimeError("the clean-up failed"), num=0)
    with pytest.raises(TransferFailed) as caught:
        run_job(job(memory="offload_host"), leases=leases)
    assert str(caught.value) == "the first error"
    assert any("the clean-up failed" in text for text in caught.value.__notes__)


def fail(error: Exception) -> None:
    raise error


@pytest.mark.parametrize(
    ("call", "code", "words"),
    [
        ("write_some", errno.EIO, "write of .* failed: Input/output error"),
        ("write_some", errno.EROFS, "write of .* failed: Read-only file system"),
        ("read_some", errno.EIO, "read of .* failed: Input/output error"),
    ],
)
def test_what_a_drive_does_wrong_is_told(call: str, code: int, words: str, job, run_job, leases, monkeypatch) -> None:
    monkeypatch.setattr(DirectFile, call, lambda self, view, offset: fail(OSError(code, os.strerror(code))))
    with pytest.raises(TransferFailed, match=words, check=has_id(ErrorId.transfer_failed)):
        run_job(job(memory="offload_ssd"), leases=leases)


def test_a_checksum_error_is_told(job, run_job, leases, monkeypatch) -> None:
    real = DirectFile.read_some

    def flipped(self: DirectFile, view: memoryview, offset: int) -> int:
        count = real(self, view, offset)
        view[0] ^= 1
        return count

    monkeypatch.setattr(DirectFile, "read_some", flipped)
    with pytest.raises(TransferFailed, match="checksum"):
        run_job(job(memory="offload_ssd"), leases=leases)
