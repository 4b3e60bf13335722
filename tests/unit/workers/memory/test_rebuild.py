"""What runs again, against brute force over tokens; and the pure helpers on spans."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.helpers.training import TINY_MODEL
from headrace.workers.memory.rebuild import merge, rebuild, subtract
from headrace.workers.model.skeleton import Kind, Reach, Segment, Skeleton, TensorSpec, dense_skeleton

NUM_TOKENS = 7


def tokens_of(spans) -> set[int]:
    return {token for begin, end in spans for token in range(begin, end)}


def spans_of(tokens: set[int]):
    return merge((token, token + 1) for token in tokens)


spans = st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), max_size=5).map(
    lambda rows: [(min(row), max(row)) for row in rows]
)


@given(spans, spans)
@settings(max_examples=200, deadline=None)
def test_spans_are_sets_of_tokens(a, b) -> None:
    merged = merge(a)
    assert tokens_of(merged) == tokens_of(a)
    assert all(x[1] < y[0] for x, y in itertools.pairwise(merged))
    assert tokens_of(subtract(merged, b)) == tokens_of(a) - tokens_of(b)


def random_program(draw: random.Random) -> tuple[Segment, ...]:
    """A few segments over tensors a, b, ... with random reads; one in three looks at earlier tokens."""
    known, segments = ["x"], []
    for number in range(draw.randint(1, 6)):
        reads = tuple(draw.sample(known, draw.randint(1, min(3, len(known)))))
        made = tuple(TensorSpec(f"{number}{letter}", 1) for letter in "ab"[: draw.randint(1, 2)])
        earlier = reads[:1] if draw.random() < 1 / 3 else ()
        segments.append(
            Segment(
                name=str(number),
                kind=Kind.pointwise,
                reads=reads,
                makes=made,
                needs=reads,
                earlier=earlier,
                reach=Reach.prefix if earlier else Reach.token,
            )
        )
        known += [tensor.name for tensor in made]
    return tuple(segments)


def brute_force(segments, held: dict[str, set[int]], wanted: dict[str, set[int]]) -> set[tuple[str, int]]:
    """(segment, token) of every run: the least set that makes all that is wanted, found by following needs."""
    maker = {tensor.name: segment for segment in segments for tensor in segment.makes}
    runs: set[tuple[str, int]] = set()
    open_needs = [(name, token) for name, tokens in wanted.items() for token in tokens]
    while open_needs:
        name, token = open_needs.pop()
        if token in held.get(name, set()):
            continue
        segment = maker[name]
        if (segment.name, token) in runs:
            continue
        runs.add((segment.name, token))
        for read in segment.reads:
            first = 0 if read in segment.earlier else token
            open_needs += [(read, t) for t in range(first, token + 1)]
    return runs


@pytest.mark.parametrize("seed", range(200))
def test_against_brute_force(seed: int) -> None:
    draw = random.Random(seed)
    segments = random_program(draw)
    names = [tensor.name for segment in segments for tensor in segment.makes]
    some = {name: {t for t in range(NUM_TOKENS) if draw.random() < 0.3} for name in names}
    wanted = {name: {t for t in range(NUM_TOKENS) if draw.random() < 0.4} for name in names if draw.random() < 0.5}
    held = {"x": set(range(NUM_TOKENS)), **some}
    runs = rebuild(segments, {n: spans_of(t) for n, t in held.items()}, {n: spans_of(t) for n, t in wanted.items()})
    found = [(run.segment.name, token) for run in runs for token in range(*run.span)]
    assert len(found) == len(set(found))
    assert set(found) == brute_force(segments, held, wanted)
    order = [int(run.segment.name) for run in runs]
    assert order == sorted(order)


def test_what_is_lost_is_named() -> None:
    (segment,) = random_program(random.Random(1))[:1]
    with pytest.raises(ValueError, match=r"\{'x': \(\(0, 3\),\)\}"):
        rebuild((segment,), {}, {segment.made[0]: ((0, 3),)})


def test_the_dense_block_runs_no_product_twice_when_all_is_held() -> None:
    skeleton, everything = dense_skeleton(TINY_MODEL), ((0, 8),)
    held = dict.fromkeys(skeleton.skeletal, everything)
    wanted = dict.fromkeys(skeleton.wanted, everything)
    assert {run.segment.kind for run in rebuild(skeleton.segments, held, wanted)} == {Kind.pointwise}
    only_input = [run.segment.name for run in rebuild(skeleton.segments, {"x": everything}, wanted)]
    assert only_input == ["norm1", "qkv", "rope", "mix", "o", "norm2", "gate_up", "act"]  # not the last product


def test_the_front_of_the_sequence_costs_a_quarter_of_attention() -> None:
    skeleton = dense_skeleton(TINY_MODEL)
    held = {**dict.fromkeys(skeleton.skeletal, ((0, 8),)), "out": ((4, 8),), "lse": ((4, 8),)}
    (mix,) = rebuild(skeleton.segments, held, {"out": ((0, 8),), "lse": ((0, 8),)})
    assert (mix.segment.name, mix.span) == ("mix", (0, 4))


@pytest.mark.parametrize(
    "change",
    [
        {"reads": ("nothing",)},
        {"makes": (TensorSpec("x", 1),)},
        {"needs": ("elsewhere",)},
        {"earlier": ("x",)},
        {"reach": Reach.prefix},
    ],
    ids=str,
)
def test_a_skeleton_that_contradicts_itself(change: dict) -> None:
    right = {"name": "s", "kind": Kind.linear, "reads": ("x",), "makes": (TensorSpec("y", 1),), "needs": ("x",)}
    Skeleton(TensorSpec("x", 1), (Segment(**right),), ("x",))
    with pytest.raises(ValueError, match="segment s"):
        Skeleton(TensorSpec("x", 1), (Segment(**{**right, **change}),), ("x",))
