"""The steps of the loss head on one block of logits, in Triton: one pass over the block each, in place, no atomics.

The same functions as in `kernels/loss/steps.py`, which has the equations; fp32 logits only.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from headrace.kernels.loss.steps import FILTER_TILE, BlockStats, RowScales

STATS_COLUMNS, STATS_WARPS = 4096, 8
# Without a filter no program has to see a whole tile of FILTER_TILE: smaller ones keep more of them on a core.
PLAIN_TILE, PLAIN_WARPS, FILTER_WARPS = (32, 128), 4, 16


def block_stats(
    logits: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    first: int,
    softcap: float | None,
    class_weight: torch.Tensor | None = None,
    want_total: bool = False,
) -> BlockStats:
    """Statistics of a block; adds the bias and applies the softcap to `logits` in place. See kernels/loss/steps.py.

    One program per row: it reads the row once, keeps maximum and sum online, and writes only where bias or softcap
    change something.

    Raises:
        ValueError: logits that are not fp32, contiguous and (n, v); vectors of another shape, or on another device.
    """
    num_rows, num_columns = _check(logits, labels=labels)
    _check_columns(logits, bias=bias, class_weight=class_weight)
    largest = logits.new_full((num_rows,), -torch.inf)
    sum_exp, picked = logits.new_zeros(num_rows), logits.new_zeros(num_rows)
    total = logits.new_zeros(num_rows) if want_total else None
    tile = min(STATS_COLUMNS, max(128, triton.next_power_of_2(num_columns)))
    if logits.numel() > 0:
        with torch.cuda.device_of(logits):
            _stats[(num_rows,)](
                logits,
                labels,
                logits if bias is None else bias,
                logits if class_weight is None else class_weight,
                largest,
                sum_exp,
                picked,
                logits if total is None else total,
                num_columns,
                first,
                1.0 if softcap is None else float(softcap),
                HAS_BIAS=bias is not None,
                HAS_CAP=softcap is not None,
                HAS_WEIGHT=class_weight is not None,
                HAS_TOTAL=want_total,
                NUM_TILES=triton.cdiv(num_columns, tile),
                COLUMNS=tile,
                num_warps=STATS_WARPS,
            )
    return BlockStats(largest, sum_exp, picked, total)


def block_gradient_(
    logits: torch.Tensor,
    labels: torch.Tensor,
    lse: torch.Tensor,
    scales: RowScales,
    *,
    first: int,
    softcap: float | None,
    class_weight: torch.Tensor | None = None,
    filter_eps: float | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """Gradient with respect to the raw logits, of logits that `block_stats` has capped. See kernels/loss/steps.py.

    One program per tile (of FILTER_TILE where there is a filter): it reads the tile once, decides whether to keep it,
    writes it once to `logits` or, rounded, to `out` (`logits` is then left as it was). A tile that holds a nan is kept.

    Returns:
        bool (ceil(n / 128), ceil(v / 128)), the tiles that were kept, each written by its own program: their count is a
        sum of flags and repeats. None without filter_eps.

    Raises:
        ValueError: as in `block_stats`; an `out` of another shape or not contiguous.
    """
    num_rows, num_columns = _check(logits, labels=labels, lse=lse, **scales._asdict())
    _check_columns(logits, class_weight=class_weight)
    target = logits if out is None else out
    if target.shape != logits.shape or not target.is_contiguous() or target.device != logits.device:
        raise ValueError(f"out: {_say(target)}; contiguous {tuple(logits.shape)} on {logits.device} expected")
    tile = PLAIN_TILE if filter_eps is None else FILTER_TILE
    grid = (triton.cdiv(num_columns, tile[1]), triton.cdiv(num_rows, tile[0]))
    kept = None
    if filter_eps is not None:
        kept = torch.empty(grid[1], grid[0], dtype=torch.bool, device=logits.device)
    if logits.numel() > 0:
        with torch.cuda.device_of(logits):
            _gradient[grid](
                logits,
                target,
                labels,
                lse,
                scales.softmax,
                scales.label,
                lse if scales.smooth is None else scales.smooth,
                lse if class_weight is None else class_weight,
                labels if kept is None else kept.view(torch.int8),
                num_rows,
                num_columns,
                first,
                1.0 if softcap is None else float(softcap),
                0.0 if filter_eps is None else float(filter_eps),
                HAS_CAP=softcap is not None,
                HAS_SMOOTH=scales.smooth is not None,
                HAS_WEIGHT=class_weight is not None,
                FILTER=filter_eps is not None,
                ROWS=tile[0],
                COLUMNS=tile[1],
                num_warps=PLAIN_WARPS if filter_eps is None else FILTER_WARPS,
            )
    return kept


@triton.jit
def _tanh(x):
    """tanh from exp; near 0, where 1 - exp cancels, its series (to x^9: below 1e-8 of the value at 0.25)."""
    small = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - small) / (1.0 + small)
    far = tl.where(x < 0, -far, far)
    square = x * x
    near = 62.0 / 2835.0 * square - 17.0 / 315.0
    near = near * square + 2.0 / 15.0
    near = near * square - 1.0 / 3.0
    near = x + x * square * near
    return tl.where(tl.abs(x) < 0.25, near, far)


@triton.jit
def _stats(
    logits,
    labels,
    bias,
    class_weight,
    largest,
    sum_exp,
    picked,
    total,
    num_columns,
    first,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_TOTAL: tl.constexpr,
    NUM_TILES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * num_columns
    cap = tl.full((), softcap, tl.float32)
    column = tl.load(labels + row) - first
    top = -float("inf")
    # Lane by lane: one reduction at the end, and sums of 1 / COLUMNS of the row before it.
    exps = tl.zeros((COLUMNS,), dtype=tl.float32)
    sums = tl.zeros((COLUMNS,), dtype=tl.float32)
    label_logit = tl.zeros((COLUMNS,), dtype=tl.float32)
    for tile in range(NUM_TILES):
        columns = tile * COLUMNS + tl.arange(0, COLUMNS)
        inside = columns < num_columns
        z = tl.load(logits + columns, mask=inside, other=0.0)
        if HAS_BIAS:
            z += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
        if HAS_CAP:
            z = _tanh(z / cap) * cap
        if HAS_BIAS or HAS_CAP:
            tl.store(logits + columns, z, mask=inside)
        if HAS_TOTAL:
            weighted = z
            if HAS_WEIGHT:
                weighted = z * tl.load(class_weight + columns, mask=inside, other=0.0).to(tl.float32)
            sums += tl.where(inside, weighted, 0.0)
        label_logit += tl.where(columns == column, z, 0.0)
        # After the cap, which would make a padded column -cap.
        z = tl.where(inside, z, -float("inf"))
        higher = tl.maximum(top, tl.max(z, 0))
        # exp(-inf - -inf) is nan: columns that are all -inf add nothing.
        anchor = tl.where(higher == -float("inf"), 0.0, higher)
        exps = exps * tl.exp(top - anchor) + tl.exp(z - anchor)
        top = higher
    tl.store(largest + row, top)
    tl.store(sum_exp + row, tl.sum(exps, 0))
    tl.store(picked + row, tl.sum(label_logit, 0))
    if HAS_TOTAL:
        tl.store(total + row, tl.sum(sums, 0))


@triton.jit
def _gradient(
    logits,
    out,
    labels,
    lse,
    softmax_scale,
    label_scale,
    smooth_scale,
    class_weight,
    kept,
    num_rows,
    num_columns,
    first,
    softcap,
    filter_eps,
    HAS_CAP: tl.constexpr,
    HAS_SMOOTH: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    FILTER: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    tile_row, tile_column = tl.program_id(1).to(tl.int64), tl.program_id(0).to(tl.int64)
    rows = tile_row * ROWS + tl.arange(0, ROWS)
    columns = tile_column * COLUMNS + tl.arange(0, COLUMNS)
    there, inside = rows < num_rows, columns < num_columns
    mask = there[:, None] & inside[None, :]
    places = rows[:, None] * num_columns + columns[None, :]
    label = tl.load(labels + rows, mask=there, other=-1)
    z = tl.load(logits + places, mask=mask, other=0.0)
    shift = tl.load(lse + rows, mask=there, other=0.0)
    grad = tl.exp(z - shift[:, None]) * tl.load(softmax_scale + rows, mask=there, other=0.0)[:, None]
    off = tl.load(label_scale + rows, mask=there, other=0.0)
    grad -= tl.where(columns[None, :] == (label - first)[:, None], off[:, None], 0.0)
    if HAS_SMOOTH:
        smooth = tl.load(smooth_scale + rows, mask=there, other=0.0)[:, None]
        if HAS_WEIGHT:
            smooth = smooth * tl.load(class_weight + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
        grad -= smooth
    if HAS_CAP:
        share = z / tl.full((), softcap, tl.float32)
        grad *= 1.0 - share * share
    # A row that is ignored is 0 whatever its logits are.
    grad = tl.where(mask & (label >= 0)[:, None], grad, 0.0)
    if FILTER:
        below = tl.abs(grad) < tl.full((), filter_eps, tl.float32)
        keep = tl.min(tl.min(below.to(tl.int32), 1), 0) == 0
        grad = tl.where(keep, grad, 0.0)
        # As many tiles in a row as the grid has programs along it.
        tl.store(kept + tile_row * tl.num_programs(0) + tile_column, keep.to(tl.int8))
    tl.store(out + places, grad.to(out.dtype.element_ty), mask=mask)


def _check(logits: torch.Tensor, **vectors: torch.Tensor | None) -> tuple[int, int]:
    if logits.dtype is not torch.float32 or logits.dim() != 2 or not logits.is_contiguous():
        raise ValueError(f"logits: {_say(logits)}; contiguous fp32 (tokens, columns) expected")
    for name, vector in vectors.items():
        wanted = torch.int64 if name == "labels" else torch.float32
        if vector is None:
            continue
        fits = vector.shape == logits.shape[:1] and vector.dtype is wanted and vector.device == logits.device
        if not fits or not vector.is_contiguous():
            raise ValueError(
                f"{name}: {_say(vector)}; contiguous {wanted} ({len(logits)},) on {logits.device} expected"
            )
    return logits.shape[0], logits.shape[1]


def _check_columns(logits: torch.Tensor, **vectors: torch.Tensor | None) -> None:
    for name, vector in vectors.items():
        if vector is None:
            continue
        fits = vector.shape == logits.shape[1:] and vector.device == logits.device
        if not fits or not vector.is_contiguous() or not vector.is_floating_point():
            raise ValueError(
                f"{name}: {_say(vector)}; contiguous floats ({logits.shape[1]},) on {logits.device} expected"
            )


def _say(tensor: torch.Tensor) -> str:
    contiguous = "contiguous" if tensor.is_contiguous() else "non-contiguous"
    return f"{contiguous} {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
