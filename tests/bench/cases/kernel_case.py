"""What `headrace bench kernels` measures: cases that travel to a child process, and what a child makes of one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

MIB = 1024**2
# The child process of every contender that is not another project's package, and of what torch itself can do.
OURS, TORCH = "ours", "torch"


@dataclass(frozen=True)
class Case:
    """One operator at one shape by one contender.

    Args:
        part: loss, attention, block or codec.
        shape_name: of the group of cases that take turns, with the operator in it: "gemma2_2b", "rms_norm/8192x4096".
        contender: who computes.
        family: contenders of one family share a process; another project's package has its own.
        shape: sizes by name.
        tolerance: the row of the tolerance table that its errors are judged by; empty where nothing is.
        options: the settings of the contender.
        environment: variables of the child; cases of one family have the same.
    """

    part: str
    shape_name: str
    contender: str
    family: str
    shape: Mapping[str, int]
    device: str
    dtype: str
    tolerance: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def group(self) -> str:
        """What the row's name begins with; cases of one group take turns and share their inputs."""
        return f"{self.part}/{self.shape_name}"

    @property
    def name(self) -> str:
        """Of the row."""
        return f"{self.group}/{self.contender}"

    @property
    def is_limit(self) -> bool:
        """Whether it is what the machine does, with no operator of anybody."""
        return self.contender.startswith("limit_")

    @property
    def operator(self) -> str:
        """What the shape's name begins with, where a part has several operators."""
        return self.shape_name.partition("/")[0]

    @property
    def torch_device(self) -> torch.device:
        """The device as torch names it."""
        return torch.device(self.device)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch names it."""
        return getattr(torch, self.dtype)

    def to_json(self) -> dict[str, Any]:
        """JSON-able words; inverse of from_json."""
        return asdict(self)

    @classmethod
    def from_json(cls, words: Mapping[str, Any]) -> Case:
        """Inverse of to_json."""
        return cls(**words)


@dataclass
class Task:
    """A case with its tensors, ready to run any number of times.

    Args:
        forward: one forward pass; its result goes to `backward`.
        backward: one backward pass into the `grad` of the leaves; None where there is none.
        leaves: their gradients are dropped before every pass.
        check: the errors of one pass against the oracle, by name, given what `forward` returned; reads the leaves'
            gradients. Called after the first pass only: a contender may write over its inputs.
        forward_bytes / backward_bytes: the least that has to be read and written; 0 where no rate is asked for.
        forward_flops / backward_flops: of the products, a multiply-add counted twice; 0 likewise.
        facts: for the row's config.
    """

    forward: Callable[[], Any]
    backward: Callable[[Any], Any] | None
    leaves: tuple[torch.Tensor, ...]
    check: Callable[[Any], Mapping[str, float]]
    forward_bytes: int = 0
    backward_bytes: int = 0
    forward_flops: float = 0.0
    backward_flops: float = 0.0
    facts: Mapping[str, Any] = field(default_factory=dict)


class Shared:
    """What the cases of one group in one process share: inputs and oracles, made when first asked for."""

    def __init__(self) -> None:
        self._made: dict[str, Any] = {}

    def get(self, key: str, make: Callable[[], Any]) -> Any:
        """The value of `key`; `make` is called the first time."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]


class NotHere(Exception):
    """A contender cannot compute this case: its package, its device or a feature is missing. The text says what."""


def generator(device: torch.device, seed: int) -> torch.Generator:
    """Seeded on the device itself: every process draws the same bits there."""
    return torch.Generator(device).manual_seed(seed)


def oracle_dtype(device: torch.device) -> torch.dtype:
    """fp64 on the CPU; fp32 (no TF32) on CUDA, where an fp64 oracle of real shapes would take minutes."""
    return torch.float64 if device.type == "cpu" else torch.float32
