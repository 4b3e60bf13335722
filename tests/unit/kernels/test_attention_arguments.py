"""Which operator attention takes, and the arguments that it refuses."""

from __future__ import annotations

import pytest
import torch

from headrace.kernels.attention import (
    AttentionSpec,
    ResidentBlocks,
    attention,
    attention_backward_blocks,
    attention_forward,
    attention_forward_blocks,
    block_bounds,
    block_operator,
    choose_operator,
    cut,
    operators,
)
from headrace.kernels.attention.reference_blocks import ReferenceBlocks
from headrace.kernels.backend import AttentionOperator
from headrace.kernels.packing import Packing

SCALE = 0.3


def test_operators_are_chosen_by_one_rule(draw) -> None:
    auto, q = AttentionOperator.auto, draw(1, 4, 2, 8, dtype=torch.bfloat16)
    assert choose_operator(auto, q) is AttentionOperator.flash
    assert choose_operator(auto, q, softcap=30.0) is AttentionOperator.reference
    for name in (AttentionOperator.cudnn, AttentionOperator.fa4):
        with pytest.raises(ValueError, match="bf16 or fp16 on CUDA"):
            choose_operator(name, q)
    with pytest.raises(ValueError, match="no softcap"):
        block_operator(AttentionOperator.flash, 2.0)
    for wrong in (0.0, -1.0):
        with pytest.raises(ValueError, match="softcap="):
            ReferenceBlocks(wrong)


class OnHopper:
    """What the rule asks of queries on a Hopper card."""

    is_cuda, device = True, torch.device("cuda")

    def __init__(self, dtype: torch.dtype, head_dim: int) -> None:
        self.dtype, self.shape = dtype, (1, 1, 1, head_dim)


@pytest.mark.parametrize(
    ("dtype", "head_dim", "masks", "expected"),
    [
        (torch.bfloat16, 128, {}, "cudnn"),
        (torch.bfloat16, 128, {"packed": True}, "flash"),
        (torch.bfloat16, 128, {"window": 64}, "flash"),
        (torch.bfloat16, 256, {}, "flash"),
        (torch.bfloat16, 128, {"softcap": 2.0}, "reference"),
        (torch.float32, 128, {}, "reference"),
        (torch.float64, 128, {"packed": True}, "reference"),
    ],
)
def test_the_rule_on_cuda(monkeypatch, dtype, head_dim, masks, expected: str) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    assert choose_operator(AttentionOperator.auto, OnHopper(dtype, head_dim), **masks).value == expected
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    before = choose_operator(AttentionOperator.auto, OnHopper(dtype, head_dim), **masks).value
    assert before == ("flash" if expected == "cudnn" else expected)


def test_short_pieces_never_reach_cudnn() -> None:
    """A document of one token, and every piece below the shortest length, go to flash."""
    cudnn = block_operator(AttentionOperator.cudnn)
    for side, expected in ((1, "flash"), (127, "flash"), (128, "cudnn")):
        piece = cut.Piece((0, 1), (0, side), (0, 4096), cut.PieceKind.full)
        assert operators.piece_operator(cudnn, piece).name.value == expected


@pytest.mark.parametrize(
    ("shapes", "options", "words"),
    [
        (((1, 4, 3, 8), (1, 4, 2, 8)), {}, "attention: .*do not fit"),
        (((2, 4, 2, 8), (1, 4, 2, 8)), {}, "attention: .*do not fit"),
        (((1, 4, 2, 8), (1, 4, 2, 16)), {}, "attention: .*do not fit"),
        (((1, 5, 2, 8), (1, 4, 2, 8)), {}, "5 queries from -1"),
        (((4, 2, 8), (4, 2, 8)), {}, r"q \(B, T, Hq, D\)"),
        (((1, 4, 2, 8), (1, 4, 2, 8)), {"window": 0}, "window=0: at least 1"),
        (((1, 4, 2, 8), (1, 4, 2, 8)), {"block_len": 0}, "block_len=0"),
        (((1, 4, 2, 8), (1, 4, 2, 8)), {"packing": Packing.of_lengths((3,))}, "3 tokens in documents"),
        (((1, 2, 2, 8), (1, 4, 2, 8)), {"packing": Packing.of_lengths((2,))}, "2 tokens in documents, 1 x 4"),
        (((2, 4, 2, 8), (2, 4, 2, 8)), {"packing": Packing.of_lengths((6, 2))}, "do not fill rows"),
    ],
)
def test_bad_arguments(draw, shapes, options, words: str) -> None:
    q, k = (draw(*shape) for shape in shapes)
    with pytest.raises(ValueError, match=words):
        attention(q, k, k, **{"scale": SCALE, "block_len": 2, **options})


class Listed:
    """A source that gives what it holds, whatever it is asked for."""

    def __init__(self, blocks) -> None:
        self.blocks = blocks

    def fetch(self, order):
        return iter(self.blocks)


def test_bad_arguments_of_the_streams(draw) -> None:
    q, k, v = draw(2, 5, 4, 8), draw(2, 8, 2, 8), draw(2, 8, 2, 8)
    bounds = block_bounds(8, 4)
    spec = AttentionSpec(SCALE, 8, AttentionOperator.flash, block_len=4)
    source = ResidentBlocks(k, v, bounds)
    for wrong, word in (({"num_keys": 0}, "num_keys=0"), ({"operator": AttentionOperator.auto}, "operator=auto")):
        with pytest.raises(ValueError, match=word):
            AttentionSpec(**{"scale": SCALE, "num_keys": 8, "operator": AttentionOperator.flash, **wrong})
    for first in (-1, 4):
        with pytest.raises(ValueError, match=f"5 queries from {first}"):
            attention_forward(q, k, v, AttentionSpec(SCALE, 8, AttentionOperator.flash, first_query=first))
    with pytest.raises(ValueError, match=r"block 0: k is torch\.float32"):
        attention_forward_blocks(q, ResidentBlocks(k.float(), v, bounds), spec)
    with pytest.raises(ValueError, match="last axis must be contiguous"):
        attention_forward_blocks(q, ResidentBlocks(k, v.mT.contiguous().mT, bounds), spec)
    for given, words in (([(k[:, :4], v[:, :4])], r"ended before block 1 of \(0, 1\)"), ([], "before block 0")):
        with pytest.raises(ValueError, match=words):
            attention_forward_blocks(q, Listed(given), spec)
    with pytest.raises(ValueError, match="more blocks than the 2"):
        attention_forward_blocks(q, Listed([(k[:, :4], v[:, :4])] * 3), spec)
    out, lse = attention_forward_blocks(q, source, spec)
    for changes, words in (
        ({"dout": q[:, :2]}, "dout"),
        ({"out": out.float()}, "out: torch.float32"),
        ({"lse": lse.float()}, "lse: torch.float32"),
        ({"lse": lse.mT}, "lse"),
    ):
        given = {"dout": q, "q": q, "out": out, "lse": lse, "blocks": source, "spec": spec, **changes}
        with pytest.raises(ValueError, match=words):
            attention_backward_blocks(**given, sink=lambda *_: None)
    with pytest.raises(ValueError, match="softcap"):
        attention(q, k, v, scale=SCALE, softcap=0.0)
