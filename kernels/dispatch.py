"""Who computes an operator: a choice by name, made once per run and put on record; never a silent fallback."""

from __future__ import annotations

import functools
import importlib.util
import os

import torch

from headrace.kernels.backend import Backend, Choice

# Who can compute what, besides the reference.
FUSED: dict[str, tuple[Backend, ...]] = {
    "rms_norm": (Backend.triton,),
    "add_rms_norm": (Backend.triton,),
    "apply_rope": (Backend.triton,),
    "qk_norm_rope": (Backend.triton,),
    "swiglu": (Backend.triton,),
    "geglu": (Backend.triton,),
    "linear_cross_entropy": (Backend.triton, Backend.stock),
    "page_mean": (Backend.triton,),
    "page_score": (Backend.triton,),
    "encode": (Backend.triton,),
    "decode": (Backend.triton,),
}
# `auto` takes a fused kernel on CUDA once its tests have passed there (rows in tests/bench/results); see PENDING.md.
PROVEN_ON_CUDA: frozenset[str] = frozenset()
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def choose(op: str, wanted: Backend, device: torch.device, dtype: torch.dtype) -> Choice:
    """Who computes `op` on tensors of this device and dtype.

    Raises:
        ValueError: an unknown operator, a backend that was named and cannot compute this here, or Triton's
            interpreter beside a CUDA device; says what is missing and the remedy.
    """
    return _choose(op, wanted, device.type, dtype)


def choices(wanted: Backend, device: torch.device, dtype: torch.dtype) -> tuple[Choice, ...]:
    """The choice for every operator; what a run records at its start.

    A backend that some operators do not have leaves those to the reference, and the record says so.
    """
    found = []
    for op, backends in FUSED.items():
        if wanted in (Backend.triton, Backend.stock) and wanted not in backends:
            found.append(Choice(op, wanted, Backend.reference, f"it has no {wanted.value} form"))
        else:
            found.append(choose(op, wanted, device, dtype))
    return tuple(found)


def interpreting() -> bool:
    """Whether Triton's kernels run in its interpreter (read by Triton when a kernel is defined)."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


@functools.lru_cache(maxsize=256)
def _choose(op: str, wanted: Backend, device_type: str, dtype: torch.dtype) -> Choice:
    if interpreting() and (device_type == "cuda" or torch.cuda.is_available()):
        raise ValueError(
            f"{op}: TRITON_INTERPRET={os.environ['TRITON_INTERPRET']} beside a CUDA device: kernels would run in the "
            "interpreter, slowly and with other roundings; unset TRITON_INTERPRET"
        )
    if op not in FUSED:
        raise ValueError(f"op={op}: no such operator; one of {', '.join(sorted(FUSED))}")
    if wanted is Backend.reference:
        return Choice(op, wanted, Backend.reference, "asked for")
    if wanted is Backend.auto:
        return _auto(op, device_type, dtype)
    if wanted not in FUSED[op]:
        names = ", ".join(backend.value for backend in (Backend.reference, *FUSED[op]))
        raise ValueError(f"{op}: backend={wanted.value}: it has {names}")
    if wanted is Backend.triton and (hindrance := _triton_hindrance(device_type, dtype)):
        raise ValueError(f"{op}: backend=triton: {hindrance}; backend=reference computes the same")
    return Choice(op, wanted, wanted, "asked for")


def _auto(op: str, device_type: str, dtype: torch.dtype) -> Choice:
    if device_type != "cuda":
        return Choice(
            op, Backend.auto, Backend.reference, f"fused kernels are for CUDA, the tensors are on {device_type}"
        )
    if op not in PROVEN_ON_CUDA:
        return Choice(op, Backend.auto, Backend.reference, "its fused kernel has not passed its tests on a GPU yet")
    if hindrance := _triton_hindrance(device_type, dtype):
        return Choice(op, Backend.auto, Backend.reference, hindrance)
    return Choice(op, Backend.auto, Backend.triton, "CUDA, and its tests pass there")


def _triton_hindrance(device_type: str, dtype: torch.dtype) -> str | None:
    """What keeps Triton from computing this; None when nothing does."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    if dtype not in TRITON_DTYPES:
        return f"fused kernels support fp32, bf16 and fp16, not {dtype}"
    if device_type == "cuda":
        return None
    if not interpreting():
        return f"the tensors are on {device_type}; off CUDA only Triton's interpreter runs (TRITON_INTERPRET=1)"
    if dtype is not torch.float32:
        return f"Triton's interpreter is right for fp32 only, not {dtype}"
    return None
