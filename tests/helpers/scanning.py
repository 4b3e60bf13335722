"""Gated linear attention in torch: the plain recurrence as a module, and the form that takes many tokens at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from headrace.kernels.api import Packing
from headrace.workers.model.config import ModelConfig
from headrace.workers.model.program import LinearRule, PointwiseRule, Rule, Shared
from headrace.workers.model.scan import ScanRule
from headrace.workers.model.segments import Segment, Span

Tensors = Sequence[torch.Tensor]


class LinearAttention(nn.Module):
    """The recurrence, token by token: the oracle."""

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype, device: Any, operators: Any) -> None:
        super().__init__()
        self.num_heads, width = config.num_heads, config.num_heads * config.head_size

        def linear(width_in: int, width_out: int) -> nn.Linear:
            return nn.Linear(width_in, width_out, bias=False, dtype=dtype, device=device)

        self.q_proj, self.k_proj, self.v_proj = (linear(config.hidden_size, width) for _ in range(3))
        self.g_proj = linear(config.hidden_size, self.num_heads)
        self.o_proj = linear(width, config.hidden_size)

    def forward(self, x: torch.Tensor, rope: Any, packing: Packing | None, cache: Any = None) -> torch.Tensor:
        """(B, T, H) to the same."""
        assert cache is None, "no text is generated with it"
        batch_size, num_tokens, _ = x.shape
        q, k, v = (project(x).unflatten(2, (self.num_heads, -1)) for project in (self.q_proj, self.k_proj, self.v_proj))
        starts = torch.zeros(batch_size, num_tokens, dtype=torch.bool)
        starts[:, 0] = True
        if packing is not None:
            starts = packing.positions(batch_size, num_tokens, x.device) == 0
        g = torch.sigmoid(self.g_proj(x)) * ~starts[..., None]
        state = x.new_zeros(batch_size, self.num_heads, q.shape[3], v.shape[3])
        outs = []
        for t in range(num_tokens):
            state = g[:, t, :, None, None] * state + k[:, t, :, :, None] * v[:, t, :, None, :]
            outs.append(torch.einsum("bhd,bhde->bhe", q[:, t], state) * q.shape[3] ** -0.5)
        return self.o_proj(torch.stack(outs, dim=1).flatten(2))


def scan_rules(
    config: ModelConfig, segments: Sequence[Segment], stem: str, inner: int, *, closed_form: bool
) -> tuple[Rule, ...]:
    """Of the mixer's segments."""
    project, decay, scan, o = segments
    names = tuple(f"{stem}{name}.weight" for name in project.projections)
    linear_scan = LinearScan(config.num_heads, config.head_size, inner)
    return (
        LinearRule(project, names, (None,) * 4),
        PointwiseRule(decay, (), log_decay),
        ScanRule(scan, linear_scan.forward, linear_scan.backward if closed_form else None),
        LinearRule(o, (f"{stem}o_proj.weight",), (None,)),
    )


def log_decay(reads: Tensors, params: Tensors, span: Span, shared: Shared) -> tuple[torch.Tensor, ...]:
    """log g."""
    return (F.logsigmoid(reads[0]),)


class LinearScan:
    """`inner` tokens at a time. With P = q k^T exp(G_t - G_s) for s <= t, G the sum of log g, and S the state before:

    out = P v + exp(G) q S        S' = exp(G_n) S + sum of exp(G_n - G_s) k_s v_s^T
    """

    def __init__(self, num_heads: int, head_size: int, inner: int) -> None:
        self.num_heads, self.head_size, self.inner = num_heads, head_size, inner

    def forward(self, reads: Tensors, state: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        """(B, n, width) each and (B, width)."""
        like, states = reads[0], self._state(state)
        outs = []
        for begin in range(0, like.shape[1], self.inner):
            q, k, v, g = self._heads(reads, begin, state.dtype)
            total, decay = self._decays(g)
            outs.append((q @ k.mT * decay) @ v + total.exp() * q @ states)
            states = total[:, :, -1:].exp() * states + (k * (total[:, :, -1:] - total).exp()).mT @ v
        return [self._flat(torch.cat(outs, dim=2)).to(like.dtype)], states.flatten(1)

    def backward(
        self, values: Mapping[str, torch.Tensor], state: torch.Tensor, grads: Tensors, dstate: torch.Tensor
    ) -> tuple[Tensors, torch.Tensor]:
        """Gradients of q, k, v, log g, and of the state before."""
        reads = [values[name] for name in ("q", "k", "v", "g")]
        states, begins = [self._state(state)], range(0, reads[0].shape[1], self.inner)
        for begin in begins[:-1]:
            piece = [tensor[:, begin : begin + self.inner] for tensor in reads]
            states.append(self._state(self.forward(piece, states[-1].flatten(1))[1]))
        dafter, found = self._state(dstate), []
        for begin, before in zip(reversed(begins), reversed(states), strict=True):
            q, k, v, g = self._heads(reads, begin, state.dtype)
            (dout,) = self._heads(grads, begin, state.dtype)
            *parts, dafter = self._back(q, k, v, g, before, dout, dafter)
            parts[0] = parts[0] * self.head_size**-0.5
            found.append(parts)
        wholes = (torch.cat(parts[::-1], dim=2) for parts in zip(*found, strict=True))
        return [self._flat(whole).to(reads[0].dtype) for whole in wholes], dafter.flatten(1)

    def _back(self, q, k, v, g, before, dout, dafter):  # type: ignore[no-untyped-def]
        total, decay = self._decays(g)
        last, rest = total[:, :, -1:].exp(), (total[:, :, -1:] - total).exp()
        dproduct, product = dout @ v.mT * decay, q @ k.mT * decay
        dq = dproduct @ k + total.exp() * dout @ before.mT
        dk = dproduct.mT @ q + rest * v @ dafter.mT
        dv = product.mT @ dout + rest * k @ dafter
        dbefore = (q * total.exp()).mT @ dout + last * dafter
        from_pairs = dproduct * (q @ k.mT)
        into = (k * rest * (v @ dafter.mT)).sum(-1)
        dtotal = from_pairs.sum(-1) - from_pairs.sum(-2) + (dout * (total.exp() * q @ before)).sum(-1) - into
        dtotal[:, :, -1] += into.sum(-1) + (last * before * dafter).sum((-1, -2))
        dg = dtotal.flip(-1).cumsum(-1).flip(-1)[..., None]
        return dq, dk, dv, dg, dbefore

    def _heads(self, tensors: Tensors, begin: int, dtype: torch.dtype) -> list[torch.Tensor]:
        """(B, H, n, D) of some tokens; q is scaled."""
        pieces = [tensor[:, begin : begin + self.inner].to(dtype) for tensor in tensors]
        found = [piece.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for piece in pieces]
        return [found[0] * self.head_size**-0.5, *found[1:]] if len(found) > 1 else found

    def _state(self, state: torch.Tensor) -> torch.Tensor:
        return state.unflatten(1, (self.num_heads, self.head_size, self.head_size))

    @staticmethod
    def _decays(g: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Sums of log g, (B, H, n, 1), and exp(G_t - G_s) for s <= t, (B, H, n, n)."""
        total = g.cumsum(2)
        pairs = (total - total.mT).exp()
        return total, pairs.tril()

    @staticmethod
    def _flat(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.transpose(1, 2).flatten(2)
