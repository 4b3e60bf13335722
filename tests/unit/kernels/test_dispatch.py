"""Triton's interpreter and a CUDA device exclude each other."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from headrace.kernels import dispatch
from headrace.kernels.backend import Backend


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    dispatch._choose.cache_clear()
    yield
    dispatch._choose.cache_clear()


@pytest.mark.parametrize("word", ["1", "true", "ON"])
@pytest.mark.parametrize("wanted", [Backend.auto, Backend.triton, Backend.reference])
def test_the_interpreter_beside_a_cuda_tensor_is_refused(
    word: str, wanted: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", word)
    with pytest.raises(ValueError, match="unset TRITON_INTERPRET"):
        dispatch.choose("rms_norm", wanted, torch.device("cuda", 0), torch.bfloat16)


def test_the_interpreter_on_a_machine_with_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match="unset TRITON_INTERPRET"):
        dispatch.choose("rms_norm", Backend.triton, torch.device("cpu"), torch.float32)


def test_without_the_interpreter_cuda_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    choice = dispatch.choose("rms_norm", Backend.auto, torch.device("cuda", 0), torch.bfloat16)
    assert choice.got is Backend.reference
