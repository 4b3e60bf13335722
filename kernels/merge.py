"""The one merge of partial softmax results: streaming attention, context parallel, the vocabulary-parallel softmax.

A softmax over a set of scores is known by its log-sum-exp (LSE) and, in attention, by its weighted mean `out`. Over two
disjoint sets of scores

    lse = log(exp(lse_a) + exp(lse_b)),    out = exp(lse_a - lse) out_a + exp(lse_b - lse) out_b

which is commutative and associative up to rounding (Milakov and Gimelshein 2018, arXiv 1805.02867). A row that saw
nothing has lse = -inf and any finite `out`: it weighs nothing; where neither side saw anything the result is 0, -inf.
"""

from __future__ import annotations

import torch

WIDE = (torch.float32, torch.float64)


def merge_max_sum(
    max_a: torch.Tensor, sum_a: torch.Tensor, max_b: torch.Tensor, sum_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The LSE of both sets as (max, sum of exp(score - max)), elementwise; an empty set is (-inf, 0).

    Returns:
        max, sum: so that max + log(sum) is the LSE of both sets; see `lse_of_max_sum`.

    Raises:
        ValueError: shapes or dtypes that differ or are not fp32 or fp64.
    """
    _check_wide("merge_max_sum", max_a=max_a, sum_a=sum_a, max_b=max_b, sum_b=sum_b)
    largest = torch.maximum(max_a, max_b)
    return largest, sum_a * _shrink(max_a, largest) + sum_b * _shrink(max_b, largest)


def lse_of_max_sum(largest: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """max + log(sum); -inf for the empty set (-inf, 0).

    Raises:
        ValueError: shapes or dtypes that differ or are not fp32 or fp64.
    """
    _check_wide("lse_of_max_sum", largest=largest, total=total)
    return largest + total.log()


def merge(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two partial attention results over disjoint keys become one.

    Args:
        out_a, out_b: (..., D), any floating dtype, finite everywhere.
        lse_a, lse_b: (...), fp32 or fp64.

    Returns:
        out (..., D), lse (...), both in the dtype of the LSEs.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    _check_wide("merge", lse_a=lse_a, lse_b=lse_b)
    out, lse = out_a.to(lse_a.dtype, copy=True), lse_a.clone()
    merge_(out, lse, out_b, lse_b)
    return out, lse


@torch.no_grad()
def merge_(out: torch.Tensor, lse: torch.Tensor, other_out: torch.Tensor, other_lse: torch.Tensor) -> None:
    """`merge` in place: the accumulators `out` and `lse` take in another partial result.

    Two passes over `out`, one over `other_out`, which is cast on the way; nothing of its size is allocated. An LSE is
    near log(keys), so that in fp32 every merge rounds it by some 2e-7, which is a relative error of `out`: where many
    parts are merged, hold `lse` in fp64 beside an fp32 `out`.

    Args:
        out: (..., D) fp32 or fp64; views of any stride. lse: (...), fp32 or fp64.
        other_out: (..., D), any floating dtype, finite everywhere. other_lse: (...), fp32 or fp64.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    for argument, tensor in (("out", out), ("lse", lse), ("other_lse", other_lse)):
        if tensor.dtype not in WIDE:
            raise ValueError(f"merge_: {argument} is {tensor.dtype}: fp32 or fp64")
    if not out.shape[:-1] == lse.shape == other_lse.shape or other_out.shape != out.shape:
        shapes = f"out {tuple(out.shape)}, lse {tuple(lse.shape)}"
        others = f"other_out {tuple(other_out.shape)}, other_lse {tuple(other_lse.shape)}"
        raise ValueError(f"merge_: {shapes}, {others} do not fit: out (..., D), lse (...)")
    other_lse = other_lse.to(lse.dtype)
    total = torch.logaddexp(lse, other_lse)
    out.mul_(_weight(lse, total).to(out.dtype)[..., None])
    out.addcmul_(other_out, _weight(other_lse, total).to(out.dtype)[..., None])
    lse.copy_(total)


def _shrink(own: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    """exp(own - largest), 1 where they are equal: -inf - -inf would be NaN."""
    return torch.where(own == largest, 1.0, (own - largest).exp())


def _weight(own: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """exp(own - total), 0 where nothing was seen on this side: -inf - -inf would be NaN."""
    return torch.where(own == float("-inf"), 0.0, (own - total).exp())


def _check_wide(name: str, **tensors: torch.Tensor) -> None:
    first = next(iter(tensors.values()))
    for argument, tensor in tensors.items():
        if tensor.dtype not in WIDE or tensor.dtype is not first.dtype or tensor.shape != first.shape:
            raise ValueError(
                f"{name}: {argument} is {tensor.dtype} {tuple(tensor.shape)}: fp32 or fp64 and one dtype and shape, "
                f"{first.dtype} {tuple(first.shape)}"
            )
