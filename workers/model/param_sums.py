"""Gradients of a block's parameters, added up over tiles of tokens and head groups."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from headrace.kernels.products import add_product_, product


@dataclass(frozen=True)
class Part:
    """Number `index` of `count` equal parts of a parameter's rows: those of one head group."""

    index: int
    count: int

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The part's rows, a view."""
        if self.count == 1:
            return tensor
        size = tensor.shape[0] // self.count
        return tensor[self.index * size : (self.index + 1) * size]


WHOLE = Part(0, 1)


class ParamSums:
    """Gradients of a block's parameters, added up tile after tile.

    Sums are fp32 (fp64 for fp64) and rounded to the parameter's dtype once. A block with one tile has nothing to add
    up: its products are taken in the parameter's dtype at once.

    Args:
        params: by name, the tensors that the block computes with.
        wanted: names of those that want a gradient.

    Attributes:
        params: as given.
    """

    def __init__(self, params: Mapping[str, torch.Tensor], wanted: Iterable[str], *, num_tiles: int) -> None:
        self.params, self._wanted, self._is_single = params, frozenset(wanted), num_tiles == 1
        self._sums: dict[str, torch.Tensor] = {}

    def wants(self, name: str) -> bool:
        """Whether the parameter wants a gradient."""
        return name in self._wanted

    def add_product(self, name: str, grad: torch.Tensor, x: torch.Tensor, part: Part = WHOLE) -> None:
        """W.grad += grad^T x, for (n, out) and (n, in); `part`: of W's rows, the others as they are."""
        if name not in self._wanted:
            return
        a, b = grad.t(), x
        total = self._sums.get(name)
        if part.count > 1:
            add_product_(part.of(self._whole_sum(name)), a, b)
        elif self._is_single:
            self._sums[name] = torch.mm(a, b)
        elif total is None:
            self._sums[name] = product(a, b, _wide(a.dtype))
        else:
            add_product_(total, a, b)

    def add(self, name: str, grad: torch.Tensor | None, part: Part = WHOLE) -> None:
        """A tile's gradient of a small parameter, or of a part of it; None where it wants none."""
        if grad is None or name not in self._wanted:
            return
        total = self._sums.get(name)
        if part.count > 1:
            part.of(self._whole_sum(name)).add_(grad)
        elif total is None:
            self._sums[name] = grad if self._is_single else grad.to(_wide(grad.dtype), copy=True)
        else:
            total += grad

    def _whole_sum(self, name: str) -> torch.Tensor:
        if name not in self._sums:
            param = self.params[name]
            self._sums[name] = torch.zeros(param.shape, dtype=_wide(param.dtype), device=param.device)
        return self._sums[name]

    def state(self) -> dict[str, torch.Tensor]:
        """The sums so far, by name."""
        return dict(self._sums)

    def restore(self, sums: Mapping[str, torch.Tensor]) -> None:
        """Go on from the sums of another process."""
        self._sums = dict(sums)

    def take(self, name: str) -> torch.Tensor | None:
        """The gradient in the parameter's dtype; zeros where nothing came, None where none is wanted."""
        if name not in self._wanted:
            return None
        total = self._sums.pop(name, None)
        param = self.params[name]
        if total is None:
            return torch.zeros_like(param)
        return total if total.dtype is param.dtype else total.to(param.dtype)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32
