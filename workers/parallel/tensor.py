"""Tensor parallelism with sequence-parallel norms (arXiv 1909.08053, 2205.05198): parameters, rules and vocabulary.

Parameters are DTensors over the tensor axis, so that FSDP2 and checkpoints know where every part belongs; what is
computed with is this rank's plain part. A parameter that every rank has whole (norms, one half of an adapter) sees a
part of the tokens or of the sum on each of them: its gradients are added up, in fp32 and for a block at once. If there
are fewer KV heads than ranks, those that compute one head have a part of its weights each, and gather them to compute.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from headrace.workers.model.decoder import Decoder
from headrace.workers.model.program import Gradients, Made, Pieces, PointwiseRule, Program, Shared, Tensors
from headrace.workers.model.segments import Segment, Span
from headrace.workers.model.sharded import local_part, lying_like
from headrace.workers.parallel.collectives import TENSOR, Traffic, all_gather, all_reduce_, reduce_scatter
from headrace.workers.parallel.dims import Axis
from headrace.workers.parallel.meshes import TENSOR_AXIS, Meshes

COLUMN_PARALLEL = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
ROW_PARALLEL = ("o_proj", "down_proj")
VOCABULARY = ("embed_tokens", "lm_head")
OF_KEY_HEADS = ("k_proj", "v_proj")
Move = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class TensorGroup:
    """This rank among those that share its weights. t: their number; row form: (B, n, t w), see tensor_cut.py.

    Args:
        mesh: one axis, of the parameters.
        copies: those of them that compute the same KV head; None: no two do.
    """

    mesh: DeviceMesh
    group: dist.ProcessGroup
    traffic: Traffic
    copies: dist.ProcessGroup | None = None

    @classmethod
    def of(cls, meshes: Meshes, traffic: Traffic) -> TensorGroup | None:
        """This rank's; None for a degree of 1."""
        group = meshes.group(Axis.tensor)
        return None if group is None or meshes.tensor is None else cls(meshes.tensor, group, traffic)

    def of_heads(self, num_key_heads: int) -> TensorGroup:
        """That of a model with so many KV heads. All ranks of the run call alike."""
        number = self.size // num_key_heads
        if number <= 1:
            return self
        # Tensor ranks are neighbours.
        every = [list(range(first, first + number)) for first in range(0, dist.get_world_size(), number)]
        return replace(self, copies=dist.new_subgroups_by_enumeration(every)[0])

    @property
    def size(self) -> int:
        """Tensor ranks."""
        return self.group.size()

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """(B, n, w) of this rank to (B, n, t w) of all."""
        return all_gather(x.contiguous(), self.group, self.traffic).permute(1, 2, 0, 3).flatten(2)

    def scatter(self, x: torch.Tensor) -> torch.Tensor:
        """(B, n, t w) on every rank to the sum over the ranks of this one's part, (B, n, w)."""
        parts = x.unflatten(2, (self.size, -1)).permute(2, 0, 1, 3).contiguous()
        return reduce_scatter(parts, self.group, self.traffic)

    def part(self, x: torch.Tensor) -> torch.Tensor:
        """(B, n, t w) of all to this rank's (B, n, w)."""
        return x.unflatten(2, (self.size, -1))[:, :, self.group.rank()].contiguous()

    def rule(self, segment: Segment) -> PointwiseRule:
        """Of a gather or, where the segment adds to what it makes, of a scatter."""
        adds = segment.adds is not None

        def run(reads: Pieces, params: Pieces, span: Span, shared: Shared) -> Made:
            return (self.scatter(reads[0]).add_(reads[1]) if adds else self.gather(reads[0]),)

        def back(values: Pieces, params: Pieces, grads: Pieces, at: tuple[Span, Shared], trained: bool) -> Gradients:
            return (self.gather(grads[0]) if adds else self.scatter(grads[0]),), ()

        return PointwiseRule(segment, (), run, back)

    def own_part(self, params: Tensors) -> Tensors:
        """What this rank computes with; gradients of parameters that all have whole are added up on the way back."""
        if not torch.is_grad_enabled():
            return self.parts(params)
        return dict(zip(params, _OwnPart.apply(self, tuple(params), *params.values()), strict=True))

    def parts(self, params: Tensors) -> Tensors:
        """This rank's part of each; of KV heads that several ranks compute, whole heads."""
        found = {name: local_part(param) for name, param in params.items()}
        names = [name for name in params if self.copies is not None and is_of_key_head(name)]
        if not names:
            return found
        assert self.copies is not None
        own = [found[name] for name in names]
        every = all_gather(torch.cat([part.reshape(-1) for part in own]), self.copies, self.traffic)
        for name, part, rows in zip(names, own, every.split([part.numel() for part in own], dim=1), strict=True):
            found[name] = rows.reshape(-1, *part.shape[1:])
        return found


class TensorVocabulary:
    """See VocabularyShards in workers/model/decoder.py. Rank r has the rows of torch.chunk's part r."""

    def __init__(self, tensor: TensorGroup, vocab_size: int) -> None:
        self._tensor, self.group = tensor, tensor.group
        self.on_sent: Callable[[int], None] = partial(tensor.traffic.add, TENSOR)
        self._first = self.group.rank() * -(-vocab_size // tensor.size)

    def look_up(self, embedding: nn.Embedding, tokens: torch.Tensor) -> torch.Tensor:
        """Every rank looks up those of all ranks' tokens that it has rows of."""
        weight, pad = self.rows(embedding.weight), embedding.padding_idx
        index = tokens - self._first
        is_here = (index >= 0) & (index < len(weight))
        pad_here = None if pad is None or not 0 <= pad - self._first < len(weight) else pad - self._first
        found = F.embedding(index.where(is_here, 0), weight, pad_here).masked_fill(~is_here[:, :, None], 0.0)
        return _Moved.apply(self._tensor.scatter, self._tensor.gather, self.side_by_side(found))

    def side_by_side(self, table: torch.Tensor) -> torch.Tensor:
        """See VocabularyShards."""
        return table.reshape(len(table), table.shape[1] // self._tensor.size, -1)

    def gather(self, hidden: torch.Tensor) -> torch.Tensor:
        """The loss head gives every rank the whole gradient: of it a rank takes that of its own tokens."""
        whole = _Moved.apply(self._tensor.gather, self._tensor.part, hidden)
        return whole.reshape(len(hidden), -1, hidden.shape[2])

    def rows(self, weight: torch.Tensor) -> torch.Tensor:
        """See VocabularyShards."""
        return local_part(weight)


def share_weights(model: nn.Module, tensor: TensorGroup) -> TensorGroup:
    """Parameters of a decoder become DTensors over the tensor axis, its vocabulary and final norm the group's.

    In place; before share_blocks and FSDP2. The model may be on meta.

    Returns:
        The group with those that compute the same KV head.
    """
    decoder = cast(Decoder, model)
    tensor = tensor.of_heads(decoder.config.num_kv_heads)
    for name, param in list(model.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        cut = distribute_tensor(param.data, tensor.mesh, [placement_of(name)], src_data_rank=None)
        model.get_submodule(owner).register_parameter(leaf, nn.Parameter(cut, param.requires_grad))
    decoder.shards = TensorVocabulary(tensor, decoder.config.vocab_size)
    if (norm := getattr(decoder, "norm", None)) is not None:  # of a pipeline only the last stage has it
        run_program(norm, replace(cast(Program, norm.program), own_part=tensor.own_part))
    return tensor


def placement_of(name: str) -> Placement:
    """How a parameter of a decoder lies over the tensor axis."""
    *stem, owner, _ = name.split(".")
    half = owner if owner in ("lora_A", "lora_B") else ""
    layer = stem[-1] if half else owner
    if layer in VOCABULARY or (layer in COLUMN_PARALLEL and half != "lora_A"):
        return Shard(0)
    return Shard(1) if layer in ROW_PARALLEL and half != "lora_B" else Replicate()


def is_of_key_head(name: str) -> bool:
    """Whether a parameter's rows are those of KV heads."""
    return any(leaf in OF_KEY_HEADS for leaf in name.split(".")) and placement_of(name) == Shard(0)


def is_whole(param: torch.Tensor) -> bool:
    """Whether every tensor rank has all of a parameter, or all of its shard."""
    if not isinstance(param, DTensor) or TENSOR_AXIS not in (param.device_mesh.mesh_dim_names or ()):
        return False
    return param.placements[-1].is_replicate()


def run_program(module: nn.Module, program: Program) -> None:
    """Give a block, or the final norm, another program, and its forward without a plan that runs it. In place."""
    module.program = program  # type: ignore[assignment]

    def forward(
        x: torch.Tensor, rope: tuple[torch.Tensor, ...] = (), packing: Any = None, cache: Any = None
    ) -> torch.Tensor:
        assert cache is None, "ranks that share rows keep no keys"
        return program.pass_through(module, x, Shared(rope, packing))

    module.__dict__["forward"] = forward


class _OwnPart(torch.autograd.Function):
    """apply(tensor group, names, *params): this rank's part of each, see TensorGroup.parts.

    Gradients of those that several ranks have whole are summed over these; of heads, a rank gets its rows of the sum.
    No gradient comes but with the last chunk of a row, which has the sums of all: then none goes on, and no zeros.
    """

    @staticmethod
    def forward(
        ctx: Any, tensor: TensorGroup, names: tuple[str, ...], *params: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ctx.tensor, ctx.names, ctx.params = tensor, names, params
        ctx.set_materialize_grads(False)
        found = tensor.parts(dict(zip(names, params, strict=True)))
        parts = tuple(found[name].view_as(found[name]) for name in names)
        ctx.mark_non_differentiable(
            *(part for part, param in zip(parts, params, strict=True) if not param.requires_grad)
        )
        return parts

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        tensor, found = ctx.tensor, list(grads)
        there = [(i, grad) for i, grad in enumerate(grads) if grad is not None]
        if whole := [(i, grad) for i, grad in there if is_whole(ctx.params[i])]:
            flat = _side_by_side([grad for _, grad in whole], 1)[0]
            all_reduce_(flat, tensor.group, tensor.traffic)
            for (i, grad), part in zip(whole, flat.split([grad.numel() for _, grad in whole]), strict=True):
                found[i] = part.view_as(grad).to(grad.dtype)
        if tensor.copies is not None and (heads := [(i, grad) for i, grad in there if is_of_key_head(ctx.names[i])]):
            count = tensor.copies.size()
            flat = reduce_scatter(_side_by_side([grad for _, grad in heads], count), tensor.copies, tensor.traffic)
            for (i, grad), part in zip(heads, flat.split([grad.numel() // count for _, grad in heads]), strict=True):
                found[i] = part.view(-1, *grad.shape[1:]).to(grad.dtype)
        return None, None, *(lying_like(grad, param) for grad, param in zip(found, ctx.params, strict=True))


def _side_by_side(grads: Sequence[torch.Tensor], count: int) -> torch.Tensor:
    """Gradients that are summed together: (count, all elements / count) in fp32 (fp64 for fp64)."""
    wide = torch.float64 if grads[0].dtype is torch.float64 else torch.float32
    return torch.cat([grad.reshape(count, -1).to(wide) for grad in grads], dim=1)


class _Moved(torch.autograd.Function):
    """apply(there, back, x): there(x), whose gradient is back(gradient)."""

    @staticmethod
    def forward(ctx: Any, there: Move, back: Move, x: torch.Tensor) -> torch.Tensor:
        ctx.back = back
        return there(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[None, None, torch.Tensor]:
        return None, None, ctx.back(grad)
