"""Whether a segment makes and needs what its skeleton says. A mixer of a third party may be wrong about itself."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NoReturn

import torch

from headrace.storage.core.errors import InputError
from headrace.workers.model.segments import Segment, TensorSpec


def check_tensors(
    segment: Segment,
    specs: Iterable[TensorSpec],
    tensors: Mapping[str, torch.Tensor],
    like: torch.Tensor,
    num_tokens: int,
    layer: int,
) -> None:
    """Refuse tensors that are not as a skeleton says.

    Args:
        like: (B, ...) of the compute dtype.

    Raises:
        InputError: one is missing, or has another shape or dtype; names the layer, the segment and the tensor.
    """
    batch_size, own, itemsize = like.shape[0], like.dtype, like.itemsize
    for spec in specs:
        shape = (batch_size, spec.num_rows((0, num_tokens)) if spec.is_state else num_tokens, spec.width)
        dtype = own if itemsize >= spec.least_itemsize else torch.float32
        tensor = tensors.get(spec.name)
        if tensor is None:
            _refuse(segment, layer, spec.name, "is not made")
        if tensor.shape != shape or tensor.dtype is not dtype:
            found = f"is {tuple(tensor.shape)} of {tensor.dtype}, its skeleton says {shape} of {dtype}"
            _refuse(segment, layer, spec.name, found)


class Needed(dict[str, torch.Tensor]):
    """The values that a segment's gradient is given: those that it says it needs."""

    def __init__(self, segment: Segment, layer: int, values: Mapping[str, torch.Tensor]) -> None:
        super().__init__(values)
        self._segment, self._layer = segment, layer

    def __missing__(self, name: str) -> NoReturn:
        _refuse(self._segment, self._layer, name, f"is wanted for a gradient, and `needs` is {self._segment.needs}")


def _refuse(segment: Segment, layer: int, name: str, what: str) -> NoReturn:
    raise InputError(f"layer {layer}, segment {segment.name}: {name} {what}; correct the skeleton of the layer's mixer")
