"""The options of `headrace bench kernels`, checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from headrace.bench.devices import device_named
from headrace.bench.harness import OptionValue
from headrace.platform.keys import pick
from headrace.storage.core.errors import InputError

PARTS = ("loss", "attention", "block", "codec")
DTYPES = ("float32", "bfloat16", "float16")
DEFAULTS: Mapping[str, OptionValue] = {
    "part": "all",
    "device": "auto",
    # auto is bfloat16 on CUDA and float32 on CPU.
    "dtype": "auto",
    # Of the loss: names, or TOKENSxVOCABULARYxWIDTH. auto is three published heads on CUDA and two small ones on CPU.
    "shapes": "auto",
    "contenders": "all",
    "rounds": 5,
    "limit_s": 500.0,
    "case_limit_s": 120.0,
}


@dataclass(frozen=True)
class Settings:
    """What to measure.

    Args:
        shapes: of the loss, still words; None for the device's own.
        contenders: names; None for all.
        rounds: of every contender of a group.
        limit_s: no group is begun after so many seconds.
        case_limit_s: a contender that takes longer to get ready (imports, compilation, first passes) is stopped.
    """

    parts: tuple[str, ...]
    device: torch.device
    dtype: str
    shapes: tuple[str, ...] | None
    contenders: tuple[str, ...] | None
    rounds: int
    limit_s: float
    case_limit_s: float

    @property
    def on_cuda(self) -> bool:
        """Whether the real shapes and all contenders are measured."""
        return self.device.type == "cuda"


def read_settings(options: Mapping[str, OptionValue]) -> Settings:
    """The options as values.

    Raises:
        InputError: one of them makes no sense, alone or on this machine.
    """
    device = device_named(str(options["device"]))
    parts = PARTS if options["part"] == "all" else tuple(pick("part", word, PARTS) for word in _words("part", options))
    dtype = str(options["dtype"])
    if dtype == "auto":
        dtype = "bfloat16" if device.type == "cuda" else "float32"
    rounds = int(options["rounds"])
    if rounds < 1:
        raise InputError(f"rounds={rounds}: at least 1")
    return Settings(
        parts=parts,
        device=device,
        dtype=pick("dtype", dtype, DTYPES),
        shapes=None if options["shapes"] == "auto" else tuple(_words("shapes", options)),
        contenders=None if options["contenders"] == "all" else tuple(_words("contenders", options)),
        rounds=rounds,
        limit_s=float(options["limit_s"]),
        case_limit_s=float(options["case_limit_s"]),
    )


def _words(key: str, options: Mapping[str, OptionValue]) -> list[str]:
    words = [word for word in str(options[key]).split(",") if word]
    if not words:
        raise InputError(f"{key}={options[key]}: at least one is expected")
    return words
