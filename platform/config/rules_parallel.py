"""Rules of heads, parallel degrees and ranks. See rules.py."""

from __future__ import annotations

from collections.abc import Iterator

from headrace.platform.config.schema import RunConfig
from headrace.storage.core.errors import InputError
from headrace.workers.model.tensor_cut import degree_problems
from headrace.workers.parallel.config import ONE_F_ONE_B, RingLayout, Vocabulary
from headrace.workers.parallel.dims import resolve_dims
from headrace.workers.parallel.pipeline.actions import chunks_problem, default_chunks, filling_problem, training_problem
from headrace.workers.parallel.row_cut import key_heads_problem, length_problem

Problems = Iterator[str]


def heads_divide(config: RunConfig) -> Problems:
    """Heads share the width and the KV heads evenly, and rotary embedding needs pairs."""
    model = config.model
    if model.num_heads < 1 or model.num_kv_heads < 1:
        return  # said by `ranges`
    if model.num_heads % model.num_kv_heads:
        yield (
            f"model.num_kv_heads={model.num_kv_heads}: does not divide model.num_heads={model.num_heads}; "
            f"use one of {_divisors(model.num_heads)}"
        )
    if model.head_dim is None and model.hidden_size % model.num_heads:
        yield (
            f"model.num_heads={model.num_heads}: does not divide model.hidden_size={model.hidden_size}; "
            f"use one of {_divisors(model.hidden_size)}, or set model.head_dim"
        )
    elif model.head_size % 2:
        yield f"model.head_dim={model.head_size}: rotary embedding turns pairs, so it must be even"


def heads_split(config: RunConfig) -> Problems:
    """Degrees that cut heads, columns or rows cut them evenly; of fewer KV heads several ranks have each."""
    model, parallel = config.model, config.parallel
    if parallel.ulysses >= 1 and model.num_heads % parallel.ulysses:
        yield (
            f"parallel.ulysses={parallel.ulysses}: does not divide model.num_heads={model.num_heads}; "
            f"use one of {_divisors(model.num_heads)}"
        )
    yield from degree_problems(parallel.tensor, parallel.ulysses, model)
    if problem := key_heads_problem(parallel.ulysses, model.num_kv_heads, parallel.tensor):
        yield problem
    data, degrees = config.data, {name: max(1, getattr(parallel, name)) for name in ("tensor", "ulysses", "ring")}
    lengths = {f"data.seq_len={data.seq_len}": data.seq_len} | {f"data.buckets: {n}": n for n in data.buckets[:-1]}
    for what, length in lengths.items():
        if problem := length_problem(what, length, **degrees):
            yield problem


def pipeline_fits(config: RunConfig) -> Problems:
    """A pipeline's stages, micro-batches and schedule fit together; its keys need a pipeline."""
    parallel, degree = config.parallel, config.parallel.pipeline
    schedule, chunks = parallel.pipeline_schedule, parallel.pipeline_chunks
    if degree == 1:
        for key, value, plain in (
            ("pipeline_schedule", schedule.value, ONE_F_ONE_B.value),
            ("pipeline_chunks", chunks, None),
            ("vocabulary", parallel.vocabulary.value, Vocabulary.auto.value),
        ):
            if value != plain:
                yield f"parallel.{key}={value}: parallel.pipeline=1 has no stages; raise it, or leave this key out"
        return
    chunks = default_chunks(schedule) if chunks is None else chunks
    if problem := chunks_problem(schedule, chunks):
        yield problem
    elif config.model.num_layers < degree * chunks:
        yield (
            f"parallel.pipeline={degree}: {degree} x {chunks} stages need at least as many layers, and "
            f"model.num_layers={config.model.num_layers}; lower it, or parallel.pipeline_chunks"
        )
    num = config.train.micro_batches
    if num >= 1 and (problem := filling_problem("train.micro_batches", num, degree)):
        yield problem


def ranks_match(config: RunConfig) -> Problems:
    """data x tensor x ulysses x ring x pipeline = number of ranks, and fsdp divides what it shards over."""
    parallel = config.parallel
    degrees = (parallel.data or 1, parallel.fsdp or 1, parallel.tensor, parallel.ulysses, parallel.ring)
    if min(*degrees, parallel.pipeline) < 1:
        return  # said by `ranges`
    try:
        resolve_dims(parallel, config.cluster.num_ranks)
    except InputError as error:
        yield str(error)


def shared_rows_fit(config: RunConfig) -> Problems:
    """What ranks that share the weights or the tokens of a row cannot do yet."""
    parallel, head_groups, dropout = config.parallel, config.memory.head_groups, config.adapter.dropout
    for name in ("tensor", "ulysses", "ring"):
        degree = getattr(parallel, name)
        if degree > 1 and head_groups not in (None, 1):
            yield (
                f"memory.head_groups={head_groups}: with parallel.{name}={degree} attention runs all heads of a rank "
                "at once; leave memory.head_groups out"
            )
        if degree > 1 and dropout > 0:
            yield (
                f"adapter.dropout={dropout:g}: masks follow from the places of tokens, which parallel.{name}={degree} "
                f"spreads over ranks; set adapter.dropout=0, or parallel.{name}=1"
            )
    if parallel.ring == 1 and parallel.ring_layout is not RingLayout.auto:
        yield f"parallel.ring_layout={parallel.ring_layout.value}: parallel.ring=1 has none; raise it, or set auto"


def degrees_not_built(config: RunConfig) -> Problems:
    """`plan` supports every layout, `train` all but these."""
    parallel = config.parallel
    if parallel.pipeline > 1:
        if problem := training_problem(parallel):
            yield problem
        if config.data.buckets:
            lengths = ",".join(map(str, config.data.buckets))
            yield (
                f"data.buckets={lengths}: training with parallel.pipeline={parallel.pipeline} takes rows of one "
                "length; leave data.buckets out, or set parallel.pipeline=1"
            )


def _divisors(number: int) -> str:
    return ", ".join(str(d) for d in range(1, number + 1) if number % d == 0) if number < 10_000 else "its divisors"
