"""A block whose attention runs one group of KV heads, with their query heads, at a time. No torch.

    norm1:0 qkv:0 rope:0 mix:0    norm1:1 qkv:1 rope:1 mix:1    ...    o norm2 gate_up act down

A group has tensors of its own (`q:0 k:0 v:0 out:0 lse:0`), so a plan places them and backward makes them again like any
other. Only one group's q, k and v need to be on the device at once; the norm before them runs again for every group.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import lru_cache

from headrace.storage.core.errors import InputError
from headrace.workers.model.skeleton import ROOT, Kind, Reach, Segment, Skeleton, Workspace


def of_group(name: str, group: int) -> str:
    """The name of a group's part of a tensor, or of its copy of a segment."""
    return f"{name}:{group}"


def whole_name(name: str) -> str:
    """The name of a tensor without its group."""
    return name.partition(":")[0]


def possible_groups(num_key_heads: int) -> list[int]:
    """Numbers of groups that KV heads can be cut into, ascending."""
    return [number for number in range(1, num_key_heads + 1) if num_key_heads % number == 0]


def refuse_groups(num_groups: int, num_key_heads: int) -> InputError:
    """The error for a number of groups that does not divide the KV heads."""
    possible = ", ".join(map(str, possible_groups(num_key_heads)))
    return InputError(f"memory.head_groups={num_groups}: the model has {num_key_heads} KV heads; choose of {possible}")


@lru_cache(maxsize=64)
def grouped(skeleton: Skeleton, num_groups: int) -> Skeleton:
    """The skeleton with its attention cut into so many head groups; one without attention stays as it is.

    Raises:
        InputError: the number does not divide the KV heads, or the block does not show them.
    """
    if num_groups == skeleton.head_groups:
        return skeleton
    at = [index for index, segment in enumerate(skeleton.segments) if segment.key_heads]
    if not at:
        if skeleton.segments[0].kind is Kind.opaque:
            raise InputError(f"memory.head_groups={num_groups}: a foreign block does not show its heads; choose 1")
        return skeleton
    (mix,), heads = at, skeleton.segments[at[0]].key_heads
    if num_groups < 1 or heads % num_groups or skeleton.head_groups != 1:
        raise refuse_groups(num_groups, heads)
    before = skeleton.segments[: mix + 1]
    if stray := [s.name for s in before[:-1] if s.reach is not Reach.token]:
        raise InputError(f"memory.head_groups={num_groups}: segments {stray} stand before attention; choose 1")
    root, made = skeleton.root.name, {name for segment in before for name in segment.made}
    # Up to the projections every group has the whole width.
    wide = {root}
    for segment in before:
        if segment.kind is not Kind.linear and wide.issuperset(segment.reads):
            wide.update(segment.made)
    later = tuple(_joined(segment, made, num_groups) for segment in skeleton.segments[mix + 1 :])
    copies = tuple(_copy(segment, group, num_groups, wide) for group in range(num_groups) for segment in before)
    names = [name for name in skeleton.skeletal if name in made]
    of_groups = (of_group(name, group) for group in range(num_groups) for name in names)
    others = (name for name in skeleton.skeletal if name not in made and name != root)
    return Skeleton(skeleton.root, (*copies, *later), (root, *of_groups, *others), head_groups=num_groups)


def _copy(segment: Segment, group: int, num_groups: int, wide: set[str]) -> Segment:
    """A group's part of a segment up to attention; `wide`: tensors that have the whole width in every group.

    Gradients of parameters are summed in whole tensors; the last group makes them, because its gradients come first. Of
    an adapter the narrow product, which every group runs, is counted once.
    """
    share = 1 if wide.issuperset(segment.made) else num_groups
    is_first_back = group == num_groups - 1

    def own(names: Iterable[str]) -> tuple[str, ...]:
        return tuple(name if name == ROOT else of_group(name, group) for name in names)

    def workspace(itemsize: int) -> Workspace:
        whole = segment.workspace(itemsize)
        return Workspace(whole.run // share, whole.grad // share)

    return replace(
        segment,
        name=of_group(segment.name, group),
        reads=own(segment.reads),
        earlier=own(segment.earlier),
        needs=own(segment.needs),
        makes=tuple(
            replace(spec, name=of_group(spec.name, group), width=spec.width // share) for spec in segment.makes
        ),
        macs_per_token=segment.macs_per_token // share,
        macs_per_pair=segment.macs_per_pair // share,
        weights=segment.weights if is_first_back else 0,
        adapted=segment.adapted if is_first_back else 0,
        key_heads=segment.key_heads // num_groups,
        workspace=workspace,
    )


def _joined(segment: Segment, made: set[str], num_groups: int) -> Segment:
    """A segment behind attention: what it reads of attention it reads of every group."""
    if not made.intersection((*segment.reads, *segment.needs)):
        return segment
    if segment.kind is not Kind.linear:
        raise InputError(
            f"memory.head_groups={num_groups}: segment {segment.name} reads attention's tensors and is no projection; "
            "choose 1"
        )

    def each(names: Iterable[str]) -> tuple[str, ...]:
        parts = ([of_group(name, g) for g in range(num_groups)] if name in made else [name] for name in names)
        return tuple(name for names_of_one in parts for name in names_of_one)

    return replace(segment, reads=each(segment.reads), needs=each(segment.needs))
