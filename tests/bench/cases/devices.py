"""The device that a benchmark's `device=` names."""

from __future__ import annotations

import torch

from headrace.platform.keys import pick
from headrace.storage.core.errors import InputError


def device_named(word: str) -> torch.device:
    """auto | cpu | cuda to a device; auto takes the current GPU where there is one.

    Raises:
        InputError: another word, or no GPU for `cuda`.
    """
    kind = pick("device", word, ("auto", "cpu", "cuda"))
    there = torch.cuda.is_available()
    if kind == "cuda" and not there:
        raise InputError("device=cuda: there is no CUDA device; give device=cpu, or device=auto")
    if kind == "cuda" or (kind == "auto" and there):
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
