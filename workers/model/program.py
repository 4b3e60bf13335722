"""The torch side of a skeleton: how every segment of a block runs, and how its gradient is found.

Tensors of a block are (B, n, width) on n tokens. The modules of the block stay plain torch; a program reads their
parameters where it runs, so that FSDP2 may gather them before and free them after.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from operator import attrgetter
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import nn

from headrace.kernels.api import Packing
from headrace.kernels.attention import AttentionSpec, attention_backward, attention_forward
from headrace.workers.model.head_groups import grouped
from headrace.workers.model.param_sums import WHOLE, ParamSums, Part
from headrace.workers.model.skeleton import Segment, Skeleton, Span

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class RowPart:
    """The tokens [begin, end) of rows of `num_tokens`: what a call is given where it does not get whole rows.

    Args:
        is_for_keys: only the keys and values that the part leaves are wanted: no loss, and of the last block no output.
    """

    span: Span
    num_tokens: int
    is_for_keys: bool = False


@dataclass(frozen=True)
class Draw:
    """What random numbers of a block call follow from, beside the tensor and the token.

    Args:
        seed: of the run.
        row: number of the call's first row among all rows of the step.
        token: place of the call's first token in its row.
    """

    seed: int = 0
    step: int = 0
    layer: int = 0
    row: int = 0
    token: int = 0


@dataclass(frozen=True)
class Shared:
    """What a block call is given beside its input.

    Args:
        rope: cos and sin, (B or 1, T, D) each; empty for a program that rotates nothing.
        packing: documents inside the rows; None: every row is one document.
    """

    rope: tuple[torch.Tensor, ...] = ()
    packing: Packing | None = None
    draw: Draw = Draw()

    def tables(self, span: Span) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin of some of the tokens."""
        cos, sin = self.rope
        if span == (0, cos.shape[1]):
            return cos, sin
        return cos[:, slice(*span)], sin[:, slice(*span)]


class Rule(Protocol):
    """How a segment runs and finds its gradient. Values and gradients are by tensor name."""

    @property
    def segment(self) -> Segment:
        """What it runs."""
        ...

    @property
    def params(self) -> tuple[str, ...]:
        """Names of its parameters."""
        ...

    def run(self, params: Mapping[str, torch.Tensor], values: Tensors, span: Span, shared: Shared) -> Tensors:
        """What the segment makes of the values that it reads, without autograd."""
        ...


@dataclass(frozen=True)
class LinearRule:
    """y_i = x W_i^T + b_i for one or several weights, plus one tensor where the segment `adds` it.

    x is what the segment reads beside that tensor; several tensors stand side by side in it. Where a row holds several
    tokens (Segment.tokens_per_row), each of them is a row of the products.

    Args:
        weights / biases: parameter names, one pair for each tensor that is made; no bias: None.
        part: of the rows of every weight and bias.
    """

    segment: Segment
    weights: tuple[str, ...]
    biases: tuple[str | None, ...]
    part: Part = field(default=WHOLE, kw_only=True)

    @property
    def params(self) -> tuple[str, ...]:
        """Names of its parameters."""
        return (*self.weights, *(bias for bias in self.biases if bias is not None))

    def run(self, params: Mapping[str, torch.Tensor], values: Tensors, span: Span, shared: Shared) -> Tensors:
        """See Rule."""
        x, made = self.input(values), {}
        for name, weight, bias in zip(self.segment.made, self.weights, self.biases, strict=True):
            made[name] = F.linear(x, self.part.of(params[weight]), None if bias is None else self.part.of(params[bias]))
            if self.segment.tokens_per_row > 1:
                made[name] = made[name].view(len(x), span[1] - span[0], -1)
            if self.segment.adds is not None:
                made[name] += values[self.segment.adds]
        return made

    def input(self, values: Tensors) -> torch.Tensor:
        """x above, (B, n, in) for n products of each row of the batch."""
        names, count = self._inputs, self.segment.tokens_per_row
        x = values[names[0]] if len(names) == 1 else torch.cat([values[name] for name in names], dim=2)
        return x if count == 1 else x.reshape(len(x), -1, x.shape[2] // count)

    def rows(self, grads: Tensors) -> Tensors:
        """Gradients of what it makes, a row for every product: (B n, out)."""
        count = self.segment.tokens_per_row
        return {name: grads[name].reshape(-1, grads[name].shape[2] // count) for name in self.segment.made}

    def of_inputs(self, grad: torch.Tensor, span: Span) -> Tensors:
        """dx, (B n, in), as the gradients of what x is made of, (B, n, width) by name: views."""
        names, whole = self._inputs, grad.view(-1, span[1] - span[0], grad.shape[1] * self.segment.tokens_per_row)
        return {names[0]: whole} if len(names) == 1 else dict(zip(names, whole.chunk(len(names), dim=2), strict=True))

    @cached_property
    def _inputs(self) -> tuple[str, ...]:
        return tuple(name for name in self.segment.reads if name != self.segment.adds)

    def grad_input(self, params: Mapping[str, torch.Tensor], rows: Tensors, span: Span, shared: Shared) -> torch.Tensor:
        """dx = sum of dy_i W_i, (B n, in). `rows`: of every dy_i, see `rows`."""
        total: torch.Tensor | None = None
        for name, weight in zip(self.segment.made, self.weights, strict=True):
            grad, own = rows[name], self.part.of(params[weight])
            total = torch.mm(grad, own) if total is None else total.addmm_(grad, own)
        assert total is not None
        return total

    def grad_weight(
        self,
        params: Mapping[str, torch.Tensor],
        x: torch.Tensor,
        rows: Tensors,
        sums: ParamSums,
        at: tuple[Span, Shared],
    ) -> None:
        """dW_i = dy_i^T x and db_i = the sum of dy_i over the tokens. x: (B, n, in). `rows`: as grad_input."""
        of_x = x.flatten(0, 1)
        for name, weight, bias in zip(self.segment.made, self.weights, self.biases, strict=True):
            sums.add_product(weight, rows[name], of_x, self.part)
            if bias is not None and sums.wants(bias):
                sums.add(bias, rows[name].sum(dim=0), self.part)


Pieces = Sequence[torch.Tensor]
Made = tuple[torch.Tensor, ...]
Function = Callable[[Pieces, Pieces, Span, Shared], Made]
# Of what a segment reads, and of its parameters.
Gradients = tuple[Made, tuple[torch.Tensor | None, ...]]
Gradient = Callable[[Pieces, Pieces, Pieces, tuple[Span, Shared], bool], Gradients]


@dataclass(frozen=True)
class PointwiseRule:
    """A cheap function of a token's own rows.

    Args:
        function: of what the segment reads, its parameters, the span and what the pass shares; made of operations that
            autograd knows.
        gradient: in closed form, of the values that the segment `needs`, its parameters, the gradients of what it made,
            span and pass, and whether a parameter wants a gradient. Returns new tensors: of what it reads, and of the
            parameters (fp32, fp64 for fp64; not read unless wanted). None: the function runs again under autograd, and
            the segment needs all that it reads.
    """

    segment: Segment
    params: tuple[str, ...]
    function: Function
    gradient: Gradient | None = None

    def __post_init__(self) -> None:
        if self.gradient is None and self.segment.needs != self.segment.reads:
            raise ValueError(
                f"segment {self.segment.name}: needs {self.segment.needs} of {self.segment.reads}; without a gradient "
                "of its own it runs again under autograd and needs all that it reads"
            )

    def run(self, params: Mapping[str, torch.Tensor], values: Tensors, span: Span, shared: Shared) -> Tensors:
        """See Rule."""
        reads, own = _of(values, self.segment.reads), _of(params, self.params)
        return dict(zip(self.segment.made, self.function(reads, own, span, shared), strict=True))

    def backward(
        self,
        params: Mapping[str, torch.Tensor],
        values: Tensors,
        grads: Tensors,
        sums: ParamSums,
        at: tuple[Span, Shared],
    ) -> Tensors:
        """Gradients of what the segment reads, by name, in memory of their own; those of its parameters to the sums.

        A tensor that it `adds` has the gradient of what it makes, and is not among them.
        """
        needed, own, made = _of(values, self.segment.needs), _of(params, self.params), _of(grads, self.segment.graded)
        trained = any(map(sums.wants, self.params))
        gradient = self.gradient or self._by_autograd
        of_reads, of_params = gradient(needed, own, made, at, trained)
        if trained:
            for name, part in zip(self.params, of_params, strict=True):
                sums.add(name, part)
        reads = self.segment.reads
        if self.segment.adds is not None:
            reads = tuple(name for name in reads if name != self.segment.adds)
        return dict(zip(reads, of_reads, strict=True))

    def _by_autograd(
        self, values: Pieces, params: Pieces, grads: Pieces, at: tuple[Span, Shared], trained: bool
    ) -> Gradients:
        with torch.enable_grad():
            reads = [value.detach().requires_grad_() for value in values]
            own = [param.detach().requires_grad_(trained) for param in params]
            made = self.function(reads, own, *at)
        found = torch.autograd.grad(made, [*reads, *own] if trained else reads, grads)
        return found[: len(reads)], found[len(reads) :]


class Mixing(Rule, Protocol):
    """A rule of a `mix` segment: attention."""

    def receive(self, values: Tensors) -> None:
        """The values that the segment reads, on all tokens of the call: once, in forward, before it runs."""
        ...

    def backward(self, values: Tensors, grad: torch.Tensor, shared: Shared) -> Tensors:
        """Gradients of what the segment reads, by name, from the values that it needs and the gradient of `out`."""
        ...


OutAndLse = tuple[torch.Tensor, torch.Tensor]  # (B, n, H, D) and (B, H, n)


def by_spans(q: torch.Tensor, spans: Sequence[Span], attend: Callable[[torch.Tensor, int], OutAndLse]) -> OutAndLse:
    """Attention of queries (B, n, H, D) that stand in these spans, one behind the other. `attend`: from a token on."""
    parts = q.split([end - begin for begin, end in spans], dim=1)
    found = [attend(part, begin) for part, (begin, _) in zip(parts, spans, strict=True)]
    if len(found) == 1:
        return found[0]
    outs, lses = zip(*found, strict=True)
    return torch.cat(outs, dim=1), torch.cat(lses, dim=2)


@dataclass(frozen=True)
class MixRule:
    """Causal grouped-query attention over whole rows; gradients from q, k, v, out and LSE.

    Args:
        spec: of queries like `q` (B, n, Hq, D) from token `first`, over that many keys.
        window: keys that a query sees, itself included; None: all before it.
    """

    segment: Segment
    head_size: int
    spec: Callable[[torch.Tensor, int, int, Shared], AttentionSpec]
    window: int | None = None
    params: tuple[str, ...] = ()

    def run(self, params: Mapping[str, torch.Tensor], values: Tensors, span: Span, shared: Shared) -> Tensors:
        """Queries of the span over the keys up to its end. `values`: q of the span, k and v of [0, end)."""
        q, k, v = (self.heads(values[name]) for name in self.segment.reads)
        out, lse = attention_forward(q, k, v, self.spec(q, k.shape[1], span[0], shared))
        return dict(zip(self.segment.made, (out.flatten(2), lse.transpose(1, 2)), strict=True))

    def receive(self, values: Tensors) -> None:
        """Nothing: every run is given the keys and values that it reads."""

    def backward(self, values: Tensors, grad: torch.Tensor, shared: Shared) -> Tensors:
        """dq, dk, dv of all tokens, by the names of q, k and v."""
        reads, (out_name, lse_name) = self.segment.reads, self.segment.made
        q, k, v, out, dout = (self.heads(tensor) for tensor in (*(values[n] for n in (*reads, out_name)), grad))
        lse = values[lse_name].transpose(1, 2)
        grads = attention_backward(dout, q, k, v, out, lse, self.spec(q, k.shape[1], 0, shared))
        return {name: part.flatten(2) for name, part in zip(reads, grads, strict=True)}

    def made(self, out: torch.Tensor, lse: torch.Tensor) -> Tensors:
        """(B, n, H, D) and (B, H, n) as the segment's tensors, by their names."""
        return dict(zip(self.segment.made, (self.rows(out), self.rows(lse.transpose(1, 2).unsqueeze(3))), strict=True))

    def heads(self, tensor: torch.Tensor, width: int | None = None) -> torch.Tensor:
        """(B, n, H * D) as (B, n, H, D); `width`: D, where it is not that of a head."""
        return tensor.view(*tensor.shape[:2], -1, width or self.head_size)

    def rows(self, tensor: torch.Tensor) -> torch.Tensor:
        """The other way round."""
        return tensor.flatten(2)

    def lse(self, tensor: torch.Tensor) -> torch.Tensor:
        """(B, n, H) as (B, H, n)."""
        return self.heads(tensor, 1).squeeze(3).transpose(1, 2)

    def query_spans(self, span: Span, num_tokens: int) -> Sequence[Span]:
        """The tokens, of so many, that the queries of a span of rows are."""
        return [span]


@dataclass(frozen=True)
class Program:
    """A block's skeleton with a rule for every segment, in order.

    Args:
        own_part: of parameters that tensor ranks share, what this rank computes with; None: they are whole.
    """

    skeleton: Skeleton
    rules: tuple[Rule, ...]
    own_part: Callable[[Tensors], Tensors] | None = None

    def __post_init__(self) -> None:
        segments = tuple(rule.segment for rule in self.rules)
        if segments != self.skeleton.segments:
            raise ValueError(
                f"a program of {[s.name for s in segments]} for a skeleton of "
                f"{[s.name for s in self.skeleton.segments]}"
            )

    @cached_property
    def params(self) -> tuple[str, ...]:
        """Names of the parameters, each once."""
        return tuple(dict.fromkeys(name for rule in self.rules for name in rule.params))

    @cached_property
    def rule_of(self) -> dict[Segment, Rule]:
        """The rule of every segment."""
        return {rule.segment: rule for rule in self.rules}

    def parameters(self, block: nn.Module) -> Tensors:
        """The tensors that the block's parameters are now, by name: whole where FSDP2 has gathered them."""
        return self.reader(block)()

    def reader(self, block: nn.Module) -> Callable[[], Tensors]:
        """`parameters` of this block, cheaper from the second time; the block's modules stay those that they are."""
        owners = [(name, block if of is None else of(block), leaf) for name, of, leaf in self._places]

        def read() -> Tensors:
            return {name: getattr(owner, leaf) for name, owner, leaf in owners}

        own_part = self.own_part
        return read if own_part is None else lambda: own_part(read())

    @torch.no_grad()
    def pass_through(self, block: nn.Module, x: torch.Tensor, shared: Shared) -> torch.Tensor:
        """The block's output, (B, n, H) of (B, n, H), without a plan and without a gradient."""
        params, values, span = self.parameters(block), {self.skeleton.root.name: x}, (0, x.shape[1])
        for index, rule in enumerate(self.rules):
            values |= rule.run(params, values, span, shared)
            read = {name for later in self.skeleton.segments[index + 1 :] for name in later.takes}
            values = {name: value for name, value in values.items() if name in read or name == self.skeleton.result}
        return values[self.skeleton.result]

    def grouped(self, num_groups: int) -> Program:
        """With its attention in so many head groups: see head_groups.grouped."""
        skeleton = grouped(self.skeleton, num_groups)
        if skeleton is self.skeleton:
            return self
        (mix,) = (index for index, segment in enumerate(self.skeleton.segments) if segment.key_heads)
        parts = [Part(index, num_groups) for index in range(num_groups)]
        before = self.rules[: mix + 1]
        copies = [replace(r, part=part) if isinstance(r, LinearRule) else r for part in parts for r in before]
        rules = zip((*copies, *self.rules[mix + 1 :]), skeleton.segments, strict=True)
        return Program(skeleton, tuple(replace(rule, segment=segment) for rule, segment in rules))  # type: ignore[type-var]

    @cached_property
    def _places(self) -> list[tuple[str, attrgetter[nn.Module] | None, str]]:
        """Of every parameter: its name, the way to its module, and its name there."""
        split = ((name, *name.rpartition(".")) for name in self.params)
        return [(name, attrgetter(stem) if stem else None, leaf) for name, stem, _, leaf in split]


def _of(tensors: Mapping[str, torch.Tensor], names: Iterable[str]) -> Pieces:
    return list(map(tensors.__getitem__, names))
