"""The Triton steps of the loss head against the torch steps and against autograd in fp64."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from headrace.helpers.tolerances import rel_error
from headrace.kernels.loss import steps

fused = pytest.importorskip("headrace.kernels.fused.loss")
SMOOTHING, Z_LOSS = 0.1, 1e-2


@dataclasses.dataclass(frozen=True)
class Case:
    """A block of n x v logits that begins at column `first` of a vocabulary of `vocab`."""

    n: int = 5
    v: int = 300
    first: int = 1000
    softcap: float | None = None
    bias: bool = False
    weight: bool = False
    smoothing: float = 0.0
    scale: float = 3.0


CASES = {
    "plain": Case(),
    "softcap of 2": Case(softcap=2.0),
    "softcap of 30, bias": Case(softcap=30.0, bias=True),
    "small logits under a cap": Case(softcap=30.0, scale=0.05),
    "smoothing": Case(smoothing=SMOOTHING),
    "everything": Case(n=35, v=257, softcap=2.0, bias=True, weight=True, smoothing=SMOOTHING),
    "wider than one tile": Case(n=3, v=4096 + 77, bias=True, weight=True, smoothing=SMOOTHING),
    "one row, one column": Case(n=1, v=1, first=1),
    "at the start of the vocabulary": Case(n=2, v=130, first=0, softcap=2.0),
}


@dataclasses.dataclass
class Block:
    logits: torch.Tensor
    labels: torch.Tensor
    bias: torch.Tensor | None
    weight: torch.Tensor | None
    vocab: int

    def wide(self) -> Block:
        bias, weight = (None if part is None else part.double() for part in (self.bias, self.weight))
        return Block(self.logits.double(), self.labels.clone(), bias, weight, self.vocab)


def block(case: Case) -> Block:
    """Seeded; labels before, in and after the block, on its borders, and ignored ones."""
    generator = torch.Generator().manual_seed(case.n * case.v)
    logits = torch.randn(case.n, case.v, generator=generator) * case.scale
    labels = torch.randint(case.first, case.first + case.v, (case.n,), generator=generator)
    for row, label in enumerate((case.first, -1, case.first + case.v - 1, case.first + case.v, case.first - 1)):
        labels[row : row + 1] = label
    bias = torch.randn(case.v, generator=generator) if case.bias else None
    weight = torch.rand(case.v, generator=generator) + 0.5 if case.weight else None
    return Block(logits, labels, bias, weight, case.first + case.v + 9)


def stats(module, case: Case, given: Block) -> tuple[torch.Tensor, steps.BlockStats]:
    logits = given.logits.clone()
    found = module.block_stats(
        logits,
        given.labels,
        given.bias,
        first=case.first,
        softcap=case.softcap,
        class_weight=given.weight,
        want_total=case.smoothing > 0,
    )
    return logits, found


def scales(case: Case, given: Block, lse: torch.Tensor) -> steps.RowScales:
    """As the loss head makes them, for a loss that sees no other block."""
    counts = (given.labels >= 0).to(lse.dtype)
    weight = torch.ones(case.v, dtype=lse.dtype) if given.weight is None else given.weight
    inside = (given.labels >= case.first) & (given.labels < case.first + case.v)
    own = weight[torch.where(inside, given.labels - case.first, 0)]
    mass = (1 - case.smoothing) * own + case.smoothing / given.vocab * weight.sum()
    smooth = counts * case.smoothing / given.vocab if case.smoothing > 0 else None
    return steps.RowScales(counts * (mass + 2 * Z_LOSS * lse), counts * (1 - case.smoothing) * own, smooth)


def gradient(module, case: Case, given: Block, **options):
    """Gradient of the block, and the tiles that were kept; from the torch statistics."""
    logits, found = stats(steps, case, given)
    lse = found.max + found.sum_exp.log()
    kept = module.block_gradient_(
        logits,
        given.labels,
        lse,
        scales(case, given, lse),
        first=case.first,
        softcap=case.softcap,
        class_weight=given.weight,
        **options,
    )
    return logits if options.get("out") is None else options["out"], kept


def oracle(case: Case, given: Block) -> torch.Tensor:
    """d loss / d logits by autograd in fp64, the loss written out."""
    given = given.wide()
    raw = given.logits.requires_grad_()
    z = raw if given.bias is None else raw + given.bias
    if case.softcap is not None:
        z = case.softcap * torch.tanh(z / case.softcap)
    weight = torch.ones(case.v, dtype=torch.float64) if given.weight is None else given.weight
    lse = z.logsumexp(-1)
    inside = (given.labels >= case.first) & (given.labels < case.first + case.v)
    column = torch.where(inside, given.labels - case.first, 0)
    picked = torch.where(inside, z.gather(1, column[:, None])[:, 0], 0.0)
    own, share = weight[column], case.smoothing / given.vocab
    loss = ((1 - case.smoothing) * own + share * weight.sum()) * lse - (1 - case.smoothing) * own * picked
    loss = loss - share * (z * weight).sum(-1) + Z_LOSS * lse.square()
    (found,) = torch.autograd.grad((loss * (given.labels >= 0)).sum(), raw)
    return found


@pytest.mark.parametrize("name", CASES)
def test_statistics_against_torch_and_fp64(name: str) -> None:
    case = dataclasses.replace(CASES[name], n=min(CASES[name].n, 5))
    given = block(case)
    logits, found = stats(fused, case, given)
    torch_logits, by_torch = stats(steps, case, given)
    exact_logits, exact = stats(steps, case, given.wide())
    assert rel_error(logits, exact_logits) <= rel_error(torch_logits, exact_logits) + 2e-7
    for got, plain, wanted in zip(found, by_torch, exact, strict=True):
        if wanted is None:
            assert got is None
        else:
            assert got.dtype is torch.float32
            assert rel_error(got, wanted) <= rel_error(plain, wanted) + 1e-6


@pytest.mark.parametrize("name", CASES)
def test_gradient_against_torch_and_autograd_in_fp64(name: str) -> None:
    case, given = CASES[name], block(CASES[name])
    exact = oracle(case, given)
    got, kept = gradient(fused, case, given)
    by_torch, _ = gradient(steps, case, given)
    assert kept is None
    assert rel_error(got, exact) <= rel_error(by_torch, exact) + 1e-6
    assert not got[given.labels < 0].any()


def test_logits_stay_where_neither_bias_nor_cap_changes_them() -> None:
    case, given = CASES["plain"], block(CASES["plain"])
    logits, _ = stats(fused, case, given)
    assert torch.equal(logits, given.logits)


def test_columns_of_minus_infinity_and_ignored_rows_of_nan() -> None:
    logits = torch.randn(3, 200)
    logits[0] = -torch.inf
    logits[1, 7:] = -torch.inf
    logits[2] = torch.nan
    labels = torch.tensor([500, 3, -1])
    mine = fused.block_stats(logits.clone(), labels, None, first=0, softcap=None)
    theirs = steps.block_stats(logits.clone(), labels, None, first=0, softcap=None)
    assert float(mine.max[0]) == -torch.inf
    assert float(mine.sum_exp[0]) == 0.0
    assert rel_error(mine.sum_exp[:2], theirs.sum_exp[:2]) < 1e-6
    assert mine.sum_exp[2].isnan()  # a bad logit is seen, unless its row is ignored
    ones = steps.RowScales(torch.ones(3), torch.ones(3), None)
    fused.block_gradient_(logits, labels, torch.zeros(3), ones, first=0, softcap=None)
    assert torch.isfinite(logits).all()
    assert not logits[2].any()


def test_maximum_that_grows_from_tile_to_tile() -> None:
    """What was summed before must shrink with the new maximum; the first tile is all -inf in one row."""
    logits = torch.linspace(-20.0, 20.0, 4096 + 500).repeat(2, 1)
    logits[0, :4096] = -torch.inf
    labels = torch.tensor([4100, 0])
    found = fused.block_stats(logits.clone(), labels, None, first=0, softcap=None)
    lse = found.max + found.sum_exp.log()
    assert rel_error(lse, logits.double().logsumexp(-1)) < 1e-7
    assert rel_error(found.picked, logits.double().gather(1, labels[:, None])[:, 0]) == 0.0


def test_certain_token_keeps_its_small_gradient() -> None:
    """p - 1 with p rounded to bf16 first would be 0."""
    logits = torch.tensor([[12.0, 0.0, 0.0]])
    lse, labels = logits.logsumexp(-1), torch.tensor([0])
    exact = logits.double().softmax(-1) - torch.tensor([[1.0, 0.0, 0.0]])
    out = torch.empty(1, 3, dtype=torch.float16)
    one = steps.RowScales(torch.ones(1), torch.ones(1), None)
    fused.block_gradient_(logits, labels, lse, one, first=0, softcap=None, out=out)
    assert float(exact[0, 0]) < -1e-5
    assert float((out - exact).abs().max()) < 2.5e-7


def test_output_buffer_in_a_narrower_dtype_leaves_the_logits() -> None:
    case, given = CASES["everything"], block(CASES["everything"])
    wide, _ = gradient(fused, case, given)
    out = torch.full(given.logits.shape, torch.nan, dtype=torch.float16)
    gradient(fused, case, given, out=out)
    assert torch.equal(out, wide.to(torch.float16))


@pytest.mark.parametrize("eps", [1e-3, 0.0, 1e3])
def test_filter_keeps_the_tiles_that_torch_keeps(eps: float) -> None:
    case = Case(n=130, v=300, first=7, softcap=30.0)
    given = block(case)
    # All mass in the first columns of the first rows: some tiles are far below eps, the labels' tiles are not.
    given.logits[:128, :10] += 40.0
    given.labels[:128] = 7
    given.labels[128:] = -1
    got, kept = gradient(fused, case, given, filter_eps=eps)
    wanted, kept_by_torch = gradient(steps, case, given, filter_eps=eps)
    full, _ = gradient(fused, case, given)
    assert kept.shape == (2, 3)
    assert torch.equal(kept, kept_by_torch)
    assert int(kept.sum()) == {1e-3: 1, 0.0: 6, 1e3: 0}[eps]
    assert rel_error(got, wanted) < 1e-5
    spread = kept.repeat_interleave(128, 0)[:130].repeat_interleave(128, 1)[:, :300]
    assert torch.equal(got, torch.where(spread, full, 0.0))


def test_filter_does_not_hide_a_nan() -> None:
    logits, one = torch.zeros(1, 3), steps.RowScales(torch.zeros(1), torch.zeros(1), None)
    logits[0, 1] = torch.nan
    kept = fused.block_gradient_(logits, torch.tensor([9]), torch.zeros(1), one, first=0, softcap=None, filter_eps=1.0)
    assert kept.all()
    assert logits[0, 1].isnan()


@pytest.mark.parametrize("shape", [(0, 5), (3, 0)])
def test_empty_blocks(shape: tuple[int, int]) -> None:
    logits, labels = torch.empty(shape), torch.zeros(shape[0], dtype=torch.int64)
    mine = fused.block_stats(logits, labels, None, first=0, softcap=2.0, want_total=True)
    theirs = steps.block_stats(logits, labels, None, first=0, softcap=2.0, want_total=True)
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    rows = torch.zeros(shape[0])
    kept = fused.block_gradient_(
        logits, labels, rows, steps.RowScales(rows, rows, None), first=0, softcap=None, filter_eps=1.0
    )
    assert kept.numel() == 0


def test_bad_input_names_the_argument() -> None:
    labels, row = torch.zeros(2, dtype=torch.int64), torch.zeros(2)
    good, one = torch.zeros(2, 3), steps.RowScales(row, row, None)
    for bad in (good.double(), good[0], torch.zeros(3, 2).T):
        with pytest.raises(ValueError, match=r"logits: .* contiguous fp32"):
            fused.block_stats(bad, labels, None, first=0, softcap=None)
    with pytest.raises(ValueError, match=r"labels: .*torch.int32"):
        fused.block_stats(good, labels.int(), None, first=0, softcap=None)
    with pytest.raises(ValueError, match=r"bias: .*\(4,\)"):
        fused.block_stats(good, labels, torch.zeros(4), first=0, softcap=None)
    with pytest.raises(ValueError, match=r"lse: .*\(1,\)"):
        fused.block_gradient_(good, labels, row[:1], one, first=0, softcap=None)
    with pytest.raises(ValueError, match=r"out: .*\(3, 2\)"):
        fused.block_gradient_(good, labels, row, one, first=0, softcap=None, out=torch.zeros(3, 2))
