"""Staging blocks: the layout by hand arithmetic, pack and unpack against slices, the torch form and the Triton form."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from headrace.kernels.backend import Backend
from headrace.kernels.pack import layout_of, pack, unpack
from headrace.kernels.pack_layout import PackLayout, Piece

NUM_TOKENS = 11


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    """Skeletal tensors of a layer: views of one projection, an LSE with its tokens last, odd sizes and odd dtypes."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    qkv = draw(2, NUM_TOKENS, 40)
    return {
        "x": draw(2, NUM_TOKENS, 24),
        "q": qkv[..., :24].unflatten(-1, (6, 4)),
        "v": qkv[..., 32:39],
        "lse": draw(2, 6, NUM_TOKENS, dtype=torch.float32),
        "gate": draw(2, NUM_TOKENS, 37, dtype=torch.float16),
        "scale": draw(2, NUM_TOKENS, 1, dtype=torch.float32),
        "codes": torch.randint(-128, 128, (2, NUM_TOKENS, 5), dtype=torch.int8, generator=generator),
        "kept": torch.rand(2, NUM_TOKENS, 3, generator=generator) > 0.5,
        "sum": draw(2, NUM_TOKENS, 3, dtype=torch.float64),
        "flat": draw(NUM_TOKENS, 9, dtype=torch.float32),
    }


DIMS = {"x": 1, "q": 1, "v": 1, "lse": 2, "gate": 1, "scale": 1, "codes": 1, "kept": 1, "sum": 1, "flat": 0}


@pytest.fixture(params=[Backend.reference, Backend.triton], ids=lambda backend: backend.value)
def backend(request: pytest.FixtureRequest) -> Backend:
    if request.param is Backend.triton:
        pytest.importorskip("triton")
        if torch.cuda.is_available():
            pytest.skip("this machine has a GPU: tests/gpu runs the kernel there")
    return request.param


def token_range(name: str, tensor: torch.Tensor, begin: int, end: int) -> torch.Tensor:
    return tensor.narrow(DIMS[name], begin, end - begin)


def layout_for(tensors: dict[str, torch.Tensor], num_tokens: int, **options) -> PackLayout:
    return layout_of(tensors, num_tokens, token_dims={name: DIMS[name] for name in tensors}, **options)


def test_layout_by_hand() -> None:
    pieces = (Piece("k", (1, None, 2, 5), "bfloat16"), Piece("lse", (1, 3, None), "float32", "bfloat16"))
    layout = PackLayout((*pieces, Piece("x", (None, 8), "int8")), 7, alignment_bytes=16)
    assert layout.piece_bytes == (7 * 10 * 2, 3 * 7 * 2, 56)
    assert layout.offsets_bytes == (0, 144, 192)
    assert layout.total_bytes == 256
    assert layout.place("lse") == (144, 42)
    wide = PackLayout(layout.pieces, 7, alignment_bytes=512)
    assert (wide.offsets_bytes, wide.total_bytes) == ((0, 512, 1024), 1536)


def test_layout_asks_for_no_torch() -> None:
    code = (
        "import sys; from headrace.kernels.pack_layout import PackLayout, Piece\n"
        "layout = PackLayout((Piece('q', (1, None, 28, 128), 'bfloat16'),), 4096, 512)\n"
        "sys.exit(layout.total_bytes != 4096 * 28 * 128 * 2 or 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(("begin", "end"), [(0, NUM_TOKENS), (3, 8), (10, 11)])
def test_block_holds_the_slices_and_zeros(tensors, backend: Backend, begin: int, end: int) -> None:
    layout = layout_for(tensors, end - begin)
    out = torch.full((layout.total_bytes,), 255, dtype=torch.uint8)
    block = pack(tensors, layout, begin, out=out, backend=backend)
    assert block is out
    expected = torch.zeros_like(block)
    for name, tensor in tensors.items():
        offset, size = layout.place(name)
        piece = token_range(name, tensor, begin, end).contiguous().view(-1)
        expected[offset : offset + size] = piece.view(torch.uint8)
    assert torch.equal(block, expected)


@pytest.mark.parametrize("alignment_bytes", [16, 512])
def test_round_trip_is_bit_equal_and_writes_nothing_else(tensors, backend: Backend, alignment_bytes: int) -> None:
    begin, end = 2, 9
    layout = layout_for(tensors, end - begin, alignment_bytes=alignment_bytes)
    block = pack(tensors, layout, begin, backend=backend)
    fresh = unpack(block, layout, backend=backend)
    assert list(fresh) == list(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(fresh[name], token_range(name, tensor, begin, end))
    # Into strided views of larger tensors, at another place.
    qkv = torch.full((2, NUM_TOKENS, 40), 7.0, dtype=torch.bfloat16)
    given = {name: torch.full_like(tensor, 1) for name, tensor in tensors.items()}
    given |= {"q": qkv[..., :24].unflatten(-1, (6, 4)), "v": qkv[..., 32:39]}
    before = {name: tensor.clone() for name, tensor in given.items()}
    unpack(block, layout, out=given, begin=4, backend=backend)
    for name, tensor in tensors.items():
        assert torch.equal(token_range(name, given[name], 4, 11), token_range(name, tensor, begin, end))
        assert torch.equal(token_range(name, given[name], 0, 4), token_range(name, before[name], 0, 4))
    assert bool((qkv[..., 24:32] == 7).all())
    assert bool((qkv[..., 39:] == 7).all())


@pytest.mark.parametrize(("tensor_dtype", "staged"), [("float32", "float16"), ("float16", "float32")])
def test_casts_on_the_way_in_and_out(tensors, backend: Backend, tensor_dtype: str, staged: str) -> None:
    wide, narrow = getattr(torch, tensor_dtype), getattr(torch, staged)
    given = {"x": torch.randn(2, NUM_TOKENS, 7).to(wide), "q": tensors["q"]}
    layout = layout_for(given, 5, staged_dtypes={"x": narrow})
    block = pack(given, layout, 3, backend=backend)
    _, size = layout.place("x")
    assert torch.equal(block[:size].view(narrow).view(2, 5, 7), given["x"][:, 3:8].to(narrow))
    back = unpack(block, layout, backend=backend)
    assert back["x"].dtype is wide
    assert torch.equal(back["x"], given["x"][:, 3:8].to(narrow).to(wide))
    assert torch.equal(back["q"], given["q"][:, 3:8])


def test_cast_to_bf16(backend: Backend) -> None:
    """Triton's interpreter cuts where hardware rounds to nearest: one unit in the last place there."""
    x = torch.randn(1, 9, 33)
    layout = layout_of({"x": x}, 9, staged_dtypes={"x": torch.bfloat16})
    staged = pack({"x": x}, layout, 0, backend=backend)[: 9 * 33 * 2].view(torch.bfloat16)
    back = unpack(pack({"x": x}, layout, 0, backend=backend), layout, backend=backend)["x"]
    assert torch.equal(back.view(-1), staged.float())
    if backend is Backend.reference:
        assert torch.equal(back, x.bfloat16().float())
    assert float(((back - x) / x).abs().max()) < 2.0**-7


def test_rows_longer_than_one_tile_and_many_batch_rows(backend: Backend) -> None:
    """More strips than one table of eight, more tiles than one to a strip, expanded dimensions."""
    big = torch.randn(3, 700, 12)
    given = {
        "a": big[..., 1:8],
        "b": torch.randn(700, 3)[:, None].expand(700, 2, 3)[:, 0],
        "c": big[:1].expand(4, 700, 12),
    }
    given["d"] = big.transpose(0, 1)[:, :, :5]  # tokens first, batch behind: not contiguous behind the tokens
    layout = layout_of(given, 690, token_dims={"a": 1, "b": 0, "c": 1, "d": 0})
    with pytest.raises(ValueError, match=r"d: .* must be contiguous"):
        pack(given, layout, 5, backend=backend)
    del given["d"]
    layout = layout_of(given, 690, token_dims={"a": 1, "b": 0, "c": 1})
    back = unpack(pack(given, layout, 5, backend=backend), layout, backend=backend)
    assert torch.equal(back["a"], given["a"][:, 5:695])
    assert torch.equal(back["b"], given["b"][5:695])
    assert torch.equal(back["c"], given["c"][:, 5:695])


def test_runs_are_cut_where_32_bits_would_end(monkeypatch: pytest.MonkeyPatch) -> None:
    fused = pytest.importorskip("headrace.kernels.fused.pack")
    monkeypatch.setattr(fused, "MAX_RUN", 64)
    given = {"a": torch.randn(2, 50, 3), "b": torch.randn(1, 50, 4)}
    layout = layout_of(given, 41)
    assert len(list(fused.strips_of(given, layout, 4))) == 2 * 2 + 3
    assert torch.equal(
        pack(given, layout, 4, backend=Backend.triton), pack(given, layout, 4, backend=Backend.reference)
    )


def test_offsets_beyond_32_bits(backend: Backend) -> None:
    """Rows 1.1e9 elements apart, of which only a few pages are ever touched."""
    x = torch.empty(3, 1_100_000_000, dtype=torch.int8)
    x[:, 77:90] = torch.arange(39, dtype=torch.int8).view(3, 13)
    layout = layout_of({"x": x}, 13)
    block = pack({"x": x}, layout, 77, backend=backend)
    assert torch.equal(block[:39], torch.arange(39, dtype=torch.uint8))
    unpack(block, layout, out={"x": x}, begin=1_099_999_987, backend=backend)
    assert torch.equal(x[:, -13:].flatten(), torch.arange(39, dtype=torch.int8))


def test_strips_of_a_large_layer_in_python() -> None:
    """2 x 113,360 tokens x 18,944 columns: no tensor of that size is there, so nothing may be read."""
    fused = pytest.importorskip("headrace.kernels.fused.pack")
    shape = (2, 113_360, 18_944)
    x = torch.empty(shape, dtype=torch.bfloat16, device="meta")
    layout = layout_of({"x": x}, shape[1])
    strips = list(fused.strips_of({"x": x}, layout, 0))
    assert sum(strip.num_elements for strip in strips) * 8 == layout.total_bytes == 2 * 113_360 * 18_944 * 2
    assert all(strip.run < 2**31 - fused.TILE for strip in strips)
    ends = [strip.offset_bytes + strip.padded * 8 for strip in strips]
    assert [strip.offset_bytes for strip in strips] == [0, *ends[:-1]]


def test_gradients_do_not_flow_and_leaves_are_not_overwritten() -> None:
    x = torch.randn(1, 4, 8, requires_grad=True)
    layout = layout_of({"x": x}, 4)
    block = pack({"x": x}, layout, 0)
    assert not block.requires_grad
    with pytest.raises(ValueError, match="requires a gradient"):
        unpack(block, layout, out={"x": x})


def test_bad_input_names_the_tensor(tensors) -> None:
    layout = layout_for(tensors, 5)
    block = pack(tensors, layout, 0)
    with pytest.raises(ValueError, match=r"gate: .*tokens \[7, 12\) are not among its 11"):
        pack({"gate": tensors["gate"]}, layout_for({"gate": tensors["gate"]}, 5), 7)
    with pytest.raises(ValueError, match=r"x: torch.float32 .*bfloat16"):
        pack({**tensors, "x": tensors["x"].float()}, layout, 0)
    with pytest.raises(ValueError, match=r"x: .*\(2, 11, 23\).*\(2, None, 24\)"):
        pack({**tensors, "x": tensors["x"][..., 1:]}, layout, 0)
    with pytest.raises(ValueError, match="the layout has"):
        pack({"x": tensors["x"]}, layout, 0)
    with pytest.raises(ValueError, match=r"tokens \[-1, 4\)"):
        pack(tensors, layout, -1)
    with pytest.raises(ValueError, match=r"out: torch.uint8 \(3,\)"):
        pack(tensors, layout, 0, out=torch.zeros(3, dtype=torch.uint8))
    with pytest.raises(ValueError, match="no multiple of 16"):
        pack(tensors, layout, 0, out=torch.zeros(layout.total_bytes + 1, dtype=torch.uint8)[1:])
    with pytest.raises(ValueError, match="begin=1 without out"):
        unpack(block, layout, begin=1)
    with pytest.raises(ValueError, match="share memory"):
        unpack(block, layout, out={**tensors, "flat": torch.zeros(1, 9).expand(11, 9)})
    with pytest.raises(ValueError, match="has reference, triton"):
        pack(tensors, layout, 0, backend=Backend.stock)


def test_bad_layouts() -> None:
    piece = Piece("x", (None, 4), "float32")
    with pytest.raises(ValueError, match="each name once"):
        PackLayout((piece, piece), 3)
    with pytest.raises(ValueError, match="num_tokens=0"):
        PackLayout((piece,), 0)
    for bad in (8, 24, 0):
        with pytest.raises(ValueError, match=f"alignment_bytes={bad}"):
            PackLayout((piece,), 3, bad)
    with pytest.raises(ValueError, match="one None for the tokens"):
        Piece("x", (3, 4), "float32")
    with pytest.raises(ValueError, match="dtype=float31"):
        Piece("x", (None,), "float31")
    with pytest.raises(ValueError, match="casts are between"):
        Piece("x", (None,), "int32", "float32")
    with pytest.raises(ValueError, match="no piece y"):
        PackLayout((piece,), 3).place("y")
    with pytest.raises(ValueError, match="token_dims of x is 2"):
        layout_of({"x": torch.zeros(3, 4)}, 3, token_dims=2)
    with pytest.raises(ValueError, match=r"\['y'\] are not tensors"):
        layout_of({"x": torch.zeros(3, 4)}, 3, staged_dtypes={"y": torch.bfloat16})
