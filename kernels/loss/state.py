"""Input and weight gradients as separate calls, and the reductions that they share with the joint form."""

from __future__ import annotations

import torch

from headrace.kernels.loss import axes
from headrace.kernels.loss.options import ChunkAxis
from headrace.kernels.loss.problem import Gradients, Problem


def reduce(problem: Problem, losses: torch.Tensor) -> torch.Tensor:
    """Losses (N,) to the result of the reduction; the sum is taken in fp64."""
    if problem.terms.reduction == "none":
        return losses
    total = losses.sum(dtype=torch.float64).to(losses.dtype)
    return total if problem.terms.reduction == "sum" else total / problem.denominator


class LossState:
    """What backward needs, for a schedule that needs the input gradient early and the weight gradient late.

    Along the tokens axis both gradients were made in forward, and the state holds them (the weight's as fp32 sum)
    until they are fetched. Along the vocabulary axis it holds hidden, weight and one LSE per token, and each call makes
    the logits again: five products for both calls where the joint backward takes four.

    losses: reduced. lse: (N,); 0 where it was not requested and a token is ignored.
    """

    def __init__(
        self,
        problem: Problem,
        tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None],
        hidden: torch.Tensor,
    ) -> None:
        """`hidden` as the caller gave it: shape and dtype of its gradient."""
        self._problem = problem
        self._tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None] | None = None
        self._has_bias = tensors[2] is not None
        self._shape, self._dtype = hidden.shape, hidden.dtype
        self._fetched: set[str] = set()
        self._made: Gradients | None = None
        flat, weight, bias = tensors
        self._scored_lse: torch.Tensor | None = None
        if problem.cuts.axis is ChunkAxis.tokens:
            total, self._made = axes.sweep_tokens(problem, flat, weight, bias, (True, True, bias is not None))
            self.losses = total if problem.terms.reduction == "sum" else total / problem.denominator
            self.lse = total.new_zeros(0)
        else:
            self._tensors = tensors
            self._scored_lse, losses = axes.statistics(problem, flat, weight, bias)
            self.losses = reduce(problem, axes.spread(problem, losses))
            self.lse = axes.spread(problem, self._scored_lse.clone())

    @torch.no_grad()
    def d_input(self, cotangent: torch.Tensor | None = None, lse_cotangent: torch.Tensor | None = None) -> torch.Tensor:
        """Gradient of hidden, in its shape and dtype; with a group that of all shards.

        Args:
            cotangent: upstream gradient of the loss, in its shape and dtype; None means 1. lse_cotangent: of the LSE,
                in the shape of targets; None means 0.

        Raises:
            ValueError: a cotangent that does not fit. RuntimeError: a second call.
        """
        found = self._gradients("d_input", (True, False, False), cotangent, lse_cotangent).hidden
        assert found is not None
        return found.to(self._dtype).view(self._shape)

    @torch.no_grad()
    def d_weight(
        self, cotangent: torch.Tensor | None = None, lse_cotangent: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Gradients of weight and bias (None without one), as `d_input`; with a group those of this rank's rows."""
        found = self._gradients("d_weight", (False, True, self._has_bias), cotangent, lse_cotangent)
        assert found.weight is not None
        return found.weight, found.bias

    def _gradients(
        self, name: str, wanted: axes.Wanted, cotangent: torch.Tensor | None, lse_cotangent: torch.Tensor | None
    ) -> Gradients:
        problem = self._problem
        if name in self._fetched:
            raise RuntimeError(f"linear_cross_entropy: {name} runs once; compute the loss again")
        of_loss = self._upstream(cotangent)
        of_lse = self._lse_upstream(lse_cotangent)
        self._fetched.add(name)
        with torch.autocast(of_loss.device.type, enabled=False):
            if self._made is not None:
                made = Gradients(*(one if want else None for one, want in zip(self._made, wanted, strict=True)))
                self._made = Gradients(*(None if want else one for one, want in zip(self._made, wanted, strict=True)))
                return axes.finish_tokens(problem, made, of_loss)
            assert self._tensors is not None
            assert self._scored_lse is not None
            upstream = axes.normalise(problem, self._scored_lse, of_loss.expand(problem.num_tokens), of_lse)
            found = axes.recompute(problem, self._tensors, upstream, wanted)
        if len(self._fetched) == 2:
            self._tensors = None
        return found

    def _upstream(self, cotangent: torch.Tensor | None) -> torch.Tensor:
        if cotangent is None:
            cotangent = torch.ones_like(self.losses)
        if cotangent.numel() != self.losses.numel() or cotangent.dtype is not self.losses.dtype:
            raise ValueError(
                f"cotangent: {cotangent.dtype} of shape {tuple(cotangent.shape)}: expected {self.losses.dtype} in the "
                "shape of the loss"
            )
        cotangent = cotangent.reshape(self.losses.shape)
        return cotangent / self._problem.denominator if self._problem.terms.reduction == "mean" else cotangent

    def _lse_upstream(self, cotangent: torch.Tensor | None) -> torch.Tensor | None:
        if cotangent is None:
            return None
        if not self._problem.terms.return_lse or cotangent.numel() != self._problem.num_tokens:
            raise ValueError(
                f"lse_cotangent: shape {tuple(cotangent.shape)}: expected return_lse=True and the shape of targets"
            )
        return cotangent.reshape(-1).to(self.losses.dtype)
