"""Every term of the loss, both axes, against the whole matrix of logits in fp64: outputs and all gradients."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from headrace.helpers.tolerances import REL_ERROR, rel_error
from headrace.kernels.api import ChunkAxis, LossOptions, linear_cross_entropy

NUM_TOKENS, WIDTH, VOCAB = 13, 6, 37
TOKENS = LossOptions(axis=ChunkAxis.tokens, tokens_per_chunk=5)
VOCABULARY = LossOptions(axis=ChunkAxis.vocabulary, tokens_per_chunk=5, columns_per_chunk=8)
# Ignored tokens are taken out before the cut.
LEFT_OUT = LossOptions(axis=ChunkAxis.vocabulary, workspace_bytes=1, columns_per_chunk=16)
AXES = {"tokens": TOKENS, "vocabulary": VOCABULARY}
CLASS_WEIGHT = torch.rand(VOCAB, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
TERMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "softcap_2": {"softcap": 2.0},
    "softcap_30": {"softcap": 30.0},
    "smoothing": {"label_smoothing": 0.2},
    "smoothing_alone": {"label_smoothing": 1.0},
    "class_weight": {"class_weight": CLASS_WEIGHT},
    "z_loss": {"z_loss": 0.05},
    "all": {"softcap": 2.0, "label_smoothing": 0.1, "class_weight": CLASS_WEIGHT, "z_loss": 0.01},
}


@pytest.fixture
def targets() -> torch.Tensor:
    drawn = torch.randint(0, VOCAB, (NUM_TOKENS,), generator=torch.Generator().manual_seed(1))
    drawn[::4] = -100
    drawn[5:10] = -100  # a whole chunk of five
    return drawn


@pytest.fixture
def leaves(draw) -> list[torch.Tensor]:
    return [draw(NUM_TOKENS, WIDTH), draw(VOCAB, WIDTH), draw(VOCAB)]


def worst(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    return max(rel_error(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("terms", TERMS.values(), ids=TERMS)
@pytest.mark.parametrize(
    ("reduction", "options"),
    [
        ("sum", TOKENS),
        ("mean", TOKENS),
        ("sum", VOCABULARY),
        ("none", VOCABULARY),
        ("mean", LEFT_OUT),
        ("none", LEFT_OUT),
    ],
    ids=["sum_tokens", "mean_tokens", "sum_vocabulary", "none_vocabulary", "mean_left_out", "none_left_out"],
)
def test_terms_and_reductions(oracle, run, leaves, targets, terms, reduction, options) -> None:
    call = {"targets": targets, "reduction": reduction, **terms}
    assert worst(run(linear_cross_entropy, leaves, options=options, **call), run(oracle, leaves, **call)) < 1e-13


@pytest.mark.parametrize("terms", [TERMS["plain"], TERMS["all"]], ids=["plain", "all"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_lse_of_every_token_with_its_gradient(oracle, run, leaves, targets, terms, reduction) -> None:
    call = {"targets": targets, "reduction": reduction, "return_lse": True, **terms}
    got, expected = run(linear_cross_entropy, leaves, options=VOCABULARY, **call), run(oracle, leaves, **call)
    assert got[1].shape == targets.shape
    assert worst(got, expected) < 1e-13


def test_lse_alone_has_a_gradient(oracle, run, leaves, targets) -> None:
    def lse_of(loss: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return loss(hidden, weight, targets, bias=bias, softcap=2.0, return_lse=True)[1]

    assert worst(run(partial(lse_of, linear_cross_entropy), leaves), run(partial(lse_of, oracle), leaves)) < 1e-13


def test_z_loss_is_what_the_differentiable_lse_gives(run, leaves, targets) -> None:
    def by_hand(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        loss, lse = linear_cross_entropy(hidden, weight, targets, bias=bias, reduction="sum", return_lse=True)
        return loss + 0.3 * (lse.square() * (targets != -100)).sum()

    built_in = run(partial(linear_cross_entropy, targets=targets, z_loss=0.3, reduction="sum"), leaves)
    assert worst(built_in, run(by_hand, leaves)) < 1e-13


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("terms", [TERMS["plain"], TERMS["all"]], ids=["plain", "all"])
def test_narrow_dtypes_within_the_table(oracle, run, draw, dtype, axis, terms) -> None:
    """Wider than a tile of any matrix product, and many tokens: what is summed in the dtype itself would show."""
    inputs = [draw(61, 300, dtype=dtype) / 8, draw(131, 300, dtype=dtype) / 2, draw(131, dtype=dtype)]
    targets = torch.arange(61) * 2
    terms = {key: value for key, value in terms.items() if key != "class_weight"}
    call = {"targets": targets, "reduction": "sum", **terms}
    options = LossOptions(axis=AXES[axis].axis, tokens_per_chunk=16)
    if axis == "vocabulary":
        options = replace(options, columns_per_chunk=48)
    expected = run(oracle, [tensor.double() for tensor in inputs], **call)
    got = run(linear_cross_entropy, inputs, options=options, **call)
    assert [g.dtype for g in got[1:]] == [dtype] * 3
    assert worst(got, expected) <= REL_ERROR["linear_cross_entropy"][dtype]


def test_a_small_upstream_gradient_does_not_underflow_in_fp16(oracle, run, draw) -> None:
    """2e-6 times a softmax of 0.02 is below fp16's smallest number; times weights of 1000 it is not."""
    inputs = [draw(9, 8, dtype=torch.float16) / 1000, draw(40, 8, dtype=torch.float16) * 1000]
    scale = torch.linspace(2e-6, 4e-6, 9)

    def weighted(loss: Any, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return (loss(hidden, weight, targets=torch.arange(9), reduction="none") * scale).sum()

    leaves, exact = ([t.to(dtype).requires_grad_() for t in inputs] for dtype in (torch.float16, torch.float64))
    (got,) = torch.autograd.grad(weighted(linear_cross_entropy, *leaves), leaves[:1])
    (expected,) = torch.autograd.grad(weighted(oracle, *exact), exact[:1])
    assert rel_error(got, expected) <= REL_ERROR["linear_cross_entropy"][torch.float16]
    logits = exact[0] @ exact[1].T
    mutant = ((logits.softmax(-1) - F.one_hot(torch.arange(9), 40)) * scale[:, None]).half() @ inputs[1]
    assert rel_error(mutant, expected) > 0.01


@pytest.mark.parametrize("shift", [0, 1, 3, 20])
@pytest.mark.parametrize("shape", [(2, 7), (14,)])
def test_shift_scores_a_position_against_a_later_target(oracle, run, draw, shift, shape) -> None:
    inputs = [draw(*shape, WIDTH), draw(VOCAB, WIDTH)]
    targets = torch.randint(0, VOCAB, shape, generator=torch.Generator().manual_seed(2))
    targets[..., 4] = -100
    moved = torch.full_like(targets, -100)
    moved[..., : max(shape[-1] - shift, 0)] = targets[..., shift:]
    for reduction in ("none", "mean"):
        got = run(linear_cross_entropy, inputs, targets=targets, shift=shift, reduction=reduction)
        expected = run(oracle, inputs, targets=moved, reduction=reduction)
        assert got[0].shape == expected[0].shape
        assert worst(got, expected) < 1e-13


@pytest.mark.parametrize("axis", AXES)
def test_mean_over_an_external_count(oracle, run, leaves, targets, axis) -> None:
    for count in (20, 20.0, torch.tensor(20), torch.tensor(20.0)):
        got = run(linear_cross_entropy, leaves, targets=targets, num_valid=count, options=AXES[axis])
        assert worst(got, run(oracle, leaves, targets=targets, num_valid=20.0)) < 1e-13


def test_shards_of_the_tokens_add_up_to_the_whole(run, leaves, targets) -> None:
    """What sequence shards and gradient accumulation do, one part without a label: no mean of means."""
    count = int((targets != -100).sum())
    whole = run(partial(linear_cross_entropy, targets=targets), leaves[:2])
    parts = [
        run(partial(linear_cross_entropy, targets=targets[rows], num_valid=count), [leaves[0][rows], leaves[1]])
        for rows in (slice(0, 5), slice(5, 10), slice(10, 13))
    ]
    assert rel_error(sum(part[0] for part in parts), whole[0]) < 1e-14
    assert rel_error(torch.cat([part[1] for part in parts]), whole[1]) < 1e-14
    assert rel_error(sum(part[2] for part in parts), whole[2]) < 1e-14
    halves = (slice(0, 5), slice(10, 13))
    mutant = sum(F.cross_entropy(leaves[0][rows] @ leaves[1].T, targets[rows]) / 2 for rows in halves)
    assert rel_error(mutant, whole[0]) > 1e-3


@pytest.mark.parametrize("options", [*AXES.values(), LEFT_OUT, LossOptions()], ids=[*AXES, "left_out", "auto"])
@pytest.mark.parametrize("class_weight", [None, CLASS_WEIGHT], ids=["plain", "weighted"])
def test_all_ignored_gives_zero_and_zero_gradients(run, leaves, options, class_weight) -> None:
    hidden = leaves[0].clone()
    hidden[3] = torch.inf  # what a padded position may hold
    for num_tokens in (NUM_TOKENS, 1):
        targets = torch.full((num_tokens,), -100)
        call = {"targets": targets, "z_loss": 0.1, "label_smoothing": 0.1, "class_weight": class_weight}
        got = run(linear_cross_entropy, [hidden[-num_tokens:], *leaves[1:]], options=options, **call)
        assert all(not tensor.any() for tensor in got)


def test_what_an_ignored_token_holds_does_not_matter(run, leaves, targets) -> None:
    dirty = leaves[0].clone()
    dirty[targets == -100] = torch.nan
    for options in (*AXES.values(), LEFT_OUT):
        clean = run(linear_cross_entropy, leaves[:2], targets=targets, options=options)
        got = run(linear_cross_entropy, [dirty, leaves[1]], targets=targets, options=options)
        assert torch.equal(got[1], clean[1])
        if options is LEFT_OUT:
            assert torch.equal(got[2], clean[2])


@pytest.mark.parametrize("axis", AXES)
def test_one_token_and_another_ignore_index(oracle, run, draw, axis) -> None:
    for targets, ignore_index in ((torch.tensor([VOCAB - 1]), -100), (torch.tensor([3, 0, 7]), 0)):
        inputs = [draw(len(targets), WIDTH), draw(VOCAB, WIDTH)]
        call = {"targets": targets, "ignore_index": ignore_index}
        got = run(linear_cross_entropy, inputs, options=AXES[axis], **call)
        assert worst(got, run(oracle, inputs, **call)) < 1e-13


@pytest.mark.parametrize("axis", AXES)
def test_columns_closed_by_the_bias(oracle, run, leaves, targets, axis) -> None:
    """-inf closes padded columns, here a whole slice of eight; a softcap would open them again, so without one."""
    leaves[2][16:24] = -torch.inf
    targets = torch.where((targets >= 16) & (targets < 24), 0, targets)
    got = run(linear_cross_entropy, leaves, targets=targets, options=AXES[axis])
    assert worst(got, run(oracle, leaves, targets=targets)) < 1e-13
    assert not got[2][16:24].any()


def test_the_label_is_taken_off_before_rounding(run) -> None:
    """p is 1 - 3.4e-4, which bf16 rounds to 1: p - 1 taken there would leave no gradient."""
    hidden, weight = torch.full((1, 1), 8.0, dtype=torch.bfloat16), torch.tensor([[1.0], [0.0]], dtype=torch.bfloat16)
    probability = (hidden @ weight.T).double().softmax(-1)[0, 0]
    assert float(probability.bfloat16() - 1) == 0.0
    for options in AXES.values():
        loss = linear_cross_entropy(hidden.requires_grad_(), weight, torch.tensor([0]), options=options)
        (d_hidden,) = torch.autograd.grad(loss, hidden)
        assert loss.detach() > 0.0
        assert float(d_hidden) == pytest.approx(float(probability - 1), rel=1e-2)


def test_no_loss_is_negative(draw) -> None:
    """Label logit and LSE come from one computation: a token that is all but certain has a loss of 0, never less."""
    weight = draw(VOCAB, WIDTH, dtype=torch.bfloat16)
    hidden = weight[:NUM_TOKENS] * 30
    targets = (hidden.float() @ weight.float().T).argmax(-1)
    for options in (VOCABULARY, LossOptions()):
        assert (linear_cross_entropy(hidden, weight, targets, reduction="none", options=options) >= 0).all()


@pytest.mark.parametrize("axis", AXES)
def test_gradcheck(draw, axis) -> None:
    targets = torch.tensor([1, -100, 4])
    inputs = [draw(3, 2).requires_grad_(), draw(5, 2).requires_grad_(), draw(5).requires_grad_()]
    terms = {"softcap": 2.0, "label_smoothing": 0.1, "z_loss": 0.1, "class_weight": CLASS_WEIGHT[:5]}

    def loss(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        options = LossOptions(axis=AXES[axis].axis, tokens_per_chunk=2)
        return linear_cross_entropy(hidden, weight, targets, bias=bias, options=options, **terms)

    class Again(torch.autograd.Function):
        """gradcheck calls backward several times; ours runs once, so each call gets a loss of its own."""

        @staticmethod
        def forward(ctx: Any, *leaves: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(*leaves)
            return loss(*leaves)

        @staticmethod
        def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, ...]:
            with torch.enable_grad():
                leaves = [leaf.detach().requires_grad_() for leaf in ctx.saved_tensors]
                return torch.autograd.grad(loss(*leaves), leaves, upstream)

    assert torch.autograd.gradcheck(Again.apply, inputs)


def test_permuting_the_vocabulary_changes_nothing(run, leaves, targets) -> None:
    order = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(3))
    moved = torch.where(targets == -100, -100, torch.argsort(order)[targets.clamp_min(0)])
    for options in AXES.values():
        call = {"softcap": 2.0, "label_smoothing": 0.1, "options": options}
        a = run(linear_cross_entropy, leaves, targets=targets, class_weight=CLASS_WEIGHT, **call)
        permuted = [leaves[0], leaves[1][order], leaves[2][order]]
        b = run(linear_cross_entropy, permuted, targets=moved, class_weight=CLASS_WEIGHT[order], **call)
        assert worst([a[0], a[1], a[2][order], a[3][order]], b) < 1e-13


@pytest.mark.parametrize("softcap", [2.0, 30.0])
def test_mutant_mask_before_softcap_fails(oracle, leaves, targets, softcap) -> None:
    """A vocabulary that is no multiple of the tile, padded with zero rows whose logits the softcap keeps finite."""
    hidden, weight, _ = leaves
    hidden = hidden / 4
    exact = oracle(hidden, weight, targets, softcap=softcap)
    got = linear_cross_entropy(hidden, weight, targets, softcap=softcap, options=VOCABULARY)
    logits = torch.cat((hidden @ weight.T, torch.full((NUM_TOKENS, 3), -torch.inf, dtype=torch.float64)), dim=1)
    mutant = F.cross_entropy(softcap * torch.tanh(logits / softcap), targets)
    assert rel_error(got, exact) < 1e-13
    assert rel_error(mutant, exact) > (1e-3 if softcap == 2.0 else 1e-16)


def test_mutant_weights_after_the_token_sum_fail(run, leaves, targets) -> None:
    """reduction="none" with gradients made in forward: one mean factor in place of each token's own."""
    inputs = leaves[:2]

    def right(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return linear_cross_entropy(hidden, weight, targets, reduction="none")

    def mutant(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        loss = linear_cross_entropy(hidden, weight, targets, reduction="sum")
        return loss.expand(NUM_TOKENS) / NUM_TOKENS

    assert rel_error(run(mutant, inputs)[2], run(right, inputs)[2]) > 0.1


def test_second_implementation(run, leaves, targets) -> None:
    """torch's own chunked form, where this torch has one."""
    native = getattr(F, "linear_cross_entropy", None)
    chunked = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    if native is None or chunked is None:
        pytest.skip("this torch has no linear_cross_entropy")

    def theirs(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return native(hidden, weight, targets, ignore_index=-100, options=chunked(batch_chunk_size=4))

    for options in AXES.values():
        assert (
            worst(run(linear_cross_entropy, leaves[:2], targets=targets, options=options), run(theirs, leaves[:2]))
            < 1e-13
        )


@pytest.mark.parametrize("axis", AXES)
def test_twice_is_bit_equal(run, leaves, targets, axis) -> None:
    inputs = [leaf.float() for leaf in leaves]
    first, second = (run(linear_cross_entropy, inputs, targets=targets, options=AXES[axis]) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("axis", AXES)
def test_second_backward_is_refused(draw, targets, axis) -> None:
    hidden = draw(NUM_TOKENS, WIDTH).requires_grad_()
    loss = linear_cross_entropy(hidden, draw(VOCAB, WIDTH), targets, options=AXES[axis])
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward runs once"):
        loss.backward()


@pytest.mark.parametrize("axis", AXES)
def test_only_the_gradients_that_are_wanted(draw, targets, axis) -> None:
    hidden, weight, bias = draw(NUM_TOKENS, WIDTH), draw(VOCAB, WIDTH), draw(VOCAB)
    together = torch.autograd.grad(
        linear_cross_entropy(
            *(t.requires_grad_() for t in (hidden, weight)), targets, bias=bias.requires_grad_(), options=AXES[axis]
        ),
        (hidden, weight, bias),
    )
    for index in range(3):
        parts = [t.detach().requires_grad_(i == index) for i, t in enumerate((hidden, weight, bias))]
        loss = linear_cross_entropy(*parts[:2], targets, bias=parts[2], options=AXES[axis])
        assert torch.equal(torch.autograd.grad(loss, parts[index])[0], together[index])


def test_a_parameter_that_takes_fp32_gradients_is_handed_the_sum(draw, targets) -> None:
    weight = draw(VOCAB, WIDTH, dtype=torch.bfloat16).requires_grad_()
    if not hasattr(weight, "grad_dtype"):
        pytest.skip("this torch has no Tensor.grad_dtype")
    hidden, exact = draw(NUM_TOKENS, WIDTH, dtype=torch.bfloat16), None
    for options in AXES.values():
        plain = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets, options=options), weight)[0]
        wide = weight.detach().requires_grad_()
        wide.grad_dtype = torch.float32
        linear_cross_entropy(hidden, wide, targets, options=options).backward()
        assert wide.grad.dtype is torch.float32
        assert torch.equal(wide.grad.bfloat16(), plain)
        exact = wide.grad if exact is None else exact
        assert rel_error(wide.grad, exact) < 4e-3


def test_sums_in_the_dtype_of_the_inputs_lose_digits(oracle, run, draw) -> None:
    """What LossOptions says of sum_dtype, and why it is not the default."""
    inputs = [draw(256, 4, dtype=torch.bfloat16), draw(8, 4, dtype=torch.bfloat16)]
    call = {"targets": torch.arange(256) % 8, "reduction": "sum"}
    expected = run(oracle, [tensor.double() for tensor in inputs], **call)
    errors = []
    for sum_dtype in (None, torch.bfloat16):
        options = LossOptions(axis=ChunkAxis.tokens, tokens_per_chunk=1, sum_dtype=sum_dtype)
        errors.append(rel_error(run(linear_cross_entropy, inputs, options=options, **call)[2], expected[2]))
    assert errors[0] < 3e-3
    assert errors[1] > 2 * errors[0]


@pytest.mark.parametrize("axis", AXES)
def test_autocast_casts_the_inputs_and_leaves_the_sums_alone(run, leaves, targets, axis) -> None:
    inputs = [leaf.float() for leaf in leaves[:2]]

    def cast(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return linear_cross_entropy(hidden.bfloat16(), weight.bfloat16(), targets, options=AXES[axis])

    def autocast(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return linear_cross_entropy(hidden, weight, targets, options=AXES[axis])

    assert all(torch.equal(a, b) for a, b in zip(run(autocast, inputs), run(cast, inputs), strict=True))
