"""A block whose attention has a share of the heads, on the tokens of all Ulysses ranks (arXiv 2309.14509). No torch.

    norm1 qkv rope   exchange exchange_v   mix   home   o norm2 ...
                     q_own k_own v_own     q k v out    out_own

Row i of an exchanged tensor holds token i of every rank, each with this rank's share of the heads: the exchange needs a
rank's own tokens i only, so it runs on any tile of tokens. What a plan calls q, k, v and out are the exchanged tensors:
where they are held, nothing is exchanged again in backward. `out_own` is what the output projection reads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache

from headrace.storage.core.errors import InputError
from headrace.workers.model.segments import Kind, Segment, Skeleton, TensorSpec, Workspace

EXCHANGE, EXCHANGE_V, HOME = "exchange", "exchange_v", "home"


def own_name(name: str) -> str:
    """The name of the tensor with this rank's own tokens and all heads."""
    return f"{name}_own"


def mix_of(skeleton: Skeleton) -> Segment:
    """The attention of a block.

    Raises:
        InputError: the block does not show it.
    """
    mixes = [segment for segment in skeleton.segments if segment.key_heads]
    if len(mixes) != 1 or len(mixes[0].reads) != 3:
        names = "parallel.tensor, parallel.ulysses, parallel.ring"
        raise InputError(f"{names}: a block without attention has no part for them; set 1")
    return mixes[0]


@lru_cache(maxsize=64)
def exchanged(skeleton: Skeleton, ulysses: int, ring: int = 1) -> Skeleton:
    """The skeleton of a block whose tokens so many Ulysses and ring ranks share.

    A ring changes what attention takes beside its tensors, and nothing else.

    Raises:
        InputError: a block without attention.
    """
    tensor = next((s.tokens_per_row for s in skeleton.segments if s.key_heads), 1)
    if ulysses == ring == tensor == 1:
        return skeleton
    mix = mix_of(skeleton)
    q, k, v = (skeleton.tensors[name] for name in mix.reads)
    out = skeleton.tensors[mix.made[0]]
    # With fewer KV heads than ranks each is sent to several.
    copies = max(1, ulysses // mix.key_heads)
    wide_k, wide_v = (replace(tensor, width=copies * tensor.width) for tensor in (k, v))
    at = skeleton.segments.index(mix)
    before, after = skeleton.segments[:at], skeleton.segments[at + 1 :]
    in_row = ulysses * tensor
    own_mix = replace(mix, workspace=_mix_workspace(mix, q.width, wide_k.width, in_row, ring), tokens_per_row=in_row)
    if ulysses == 1:
        return replace(skeleton, segments=(*before, own_mix, *after))
    segments = (
        *(_making_own(segment, mix.reads) for segment in before),
        _exchange(EXCHANGE, (q, k), (q, wide_k)),
        _exchange(EXCHANGE_V, (v,), (wide_v,)),
        own_mix,
        _exchange(HOME, (out,), (replace(out, name=own_name(out.name)),), is_home=True),
        *(_reading_own(segment, out.name) for segment in after),
    )
    skeletal = {*skeleton.skeletal, *mix.reads, own_name(out.name)}
    order = (skeleton.root.name, *(name for segment in segments for name in segment.made))
    return Skeleton(skeleton.root, segments, tuple(name for name in order if name in skeletal))


def _making_own(segment: Segment, names: tuple[str, ...]) -> Segment:
    """A segment before the exchange: what it makes of these names has its own tokens."""
    makes = tuple(replace(t, name=own_name(t.name)) if t.name in names else t for t in segment.makes)
    return replace(segment, makes=makes)


def _reading_own(segment: Segment, name: str) -> Segment:
    reads, needs = (tuple(own_name(n) if n == name else n for n in each) for each in (segment.reads, segment.needs))
    return replace(segment, reads=reads, needs=needs)


def _exchange(
    name: str, given: tuple[TensorSpec, ...], makes: tuple[TensorSpec, ...], *, is_home: bool = False
) -> Segment:
    """One exchange. Its gradient is the exchange the other way and needs no value."""
    reads = tuple(tensor.name if is_home else own_name(tensor.name) for tensor in given)
    width = sum(tensor.width for tensor in makes)

    def workspace(itemsize: int) -> Workspace:
        # What is sent and what comes, before it stands in rows.
        return Workspace(2 * width * itemsize, 2 * width * itemsize)

    return Segment(
        name=name, kind=Kind.pointwise, reads=reads, makes=makes, needs=(), exchanged=width, workspace=workspace
    )


def _mix_workspace(mix: Segment, q_width: int, k_width: int, in_row: int, ring: int) -> Callable[[int], Workspace]:
    """Several tokens in a row: copies in their order of q, k, v and out; in backward of dout and the gradients, too.

    Ring: keys and values at hand and on their way, the sum of out or dq, and in backward dk and dv made, on their way,
    and coming in.
    """

    def workspace(itemsize: int) -> Workspace:
        own, wide, pair = mix.workspace(itemsize), max(4, itemsize), 2 * k_width
        copies = (2 * q_width + pair) * itemsize if in_row > 1 else 0
        passed = 2 * pair * itemsize + q_width * wide if ring > 1 else 0
        return Workspace(own.run + copies + passed, own.grad + 2 * copies + passed + (3 * pair * wide) * (ring > 1))

    return workspace
