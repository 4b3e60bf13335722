"""FLOPs of a decoder and the three utilisations that are logged. No torch.

A multiply and an add are two FLOPs; matrix products and attention count, norms and activations do not. Per document of
n tokens, with Q = num_heads * head_size and KV = num_kv_heads * head_size:

    products(n)  = 2 n (2 hidden Q + 2 hidden KV + 3 hidden intermediate)   one block: q, o; k, v; gate, up, down
    attention    = 4 Q pairs                                                one block: Q K^T and P V
    scan         = what its mixer says for a token                          one block
    head(n)      = 2 n hidden vocab

Backward is counted as twice the forward. With adapters (LoRA) a block's forward has their products too, and backward
takes no gradient of a frozen weight: the trunk's products and the head count once, adapters and attention twice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from headrace.storage.core.errors import InputError
from headrace.workers.memory.chunk_plan import pairs_seen
from headrace.workers.memory.plan import LayerPlan, MemoryPlan, Sweep
from headrace.workers.memory.schedule import all_reruns, schedule_of
from headrace.workers.model.adapter import block_skeletons
from headrace.workers.model.config import NO_ADAPTER, AdapterConfig, ModelConfig
from headrace.workers.model.skeleton import Skeleton, chunk_skeleton
from headrace.workers.telemetry import names

BACKWARD_OVER_FORWARD = 2  # of the head, where its weight is trained


@dataclass(frozen=True)
class MicroBatch:
    """What one forward and backward computed on one rank.

    Args:
        lengths: tokens of every document, padding not included.
        plan: that its blocks followed.
        num_rows: rows that the documents are in.
        prefixes: tokens before every document that its tokens see; empty: none.
        num_sharers: ranks that share the rows: each computes as much of them.
    """

    lengths: Sequence[int]
    plan: MemoryPlan
    num_rows: int = 1
    prefixes: Sequence[int] = ()
    num_sharers: int = 1


def causal_pairs(length: int, window: int | None = None, prefix: int = 0) -> int:
    """(query, key) pairs of one document under a causal mask: query i sees min(prefix + i + 1, window) keys."""
    if prefix:
        return causal_pairs(prefix + length, window) - causal_pairs(prefix, window)
    if window is None or window >= length:
        return length * (length + 1) // 2
    return window * (window + 1) // 2 + (length - window) * window


def full_pairs(length: int, window: int | None = None, prefix: int = 0) -> int:
    """The same when the triangle is not subtracted: every query sees min(prefix + length, window) keys."""
    return length * (prefix + length if window is None else min(prefix + length, window))


def _pairs(model: ModelConfig, lengths: Sequence[int], prefixes: Sequence[int], *, causal: bool) -> int:
    """Of all documents together."""
    count = causal_pairs if causal else full_pairs
    before = prefixes or (0,) * len(lengths)
    return sum(count(n, model.sliding_window, prefix) for n, prefix in zip(lengths, before, strict=True))


def head_flops(model: ModelConfig, num_tokens: int) -> float:
    """Forward FLOPs of the output projection; the embedding is a look-up and costs none."""
    return 2.0 * num_tokens * model.hidden_size * model.vocab_size


def block_flops(skeleton: Skeleton, num_tokens: float, num_pairs: float) -> tuple[float, float]:
    """Of one forward of a block, and of one backward that runs nothing again."""
    forward = sum(segment.flops(num_tokens, num_pairs) for segment in skeleton.segments)
    return forward, sum(segment.grad_flops(num_tokens, num_pairs) for segment in skeleton.segments)


def blocks_flops(skeletons: Iterable[Skeleton], num_tokens: float, num_pairs: float) -> tuple[float, float]:
    """The same of all these blocks."""
    counts = Counter(skeletons)
    each = [(count, block_flops(skeleton, num_tokens, num_pairs)) for skeleton, count in counts.items()]
    return sum(count * flops[0] for count, flops in each), sum(count * flops[1] for count, flops in each)


def adapter_flops(skeleton: Skeleton, num_tokens: float) -> float:
    """Of the adapters' own products: backward takes them once more, whatever a plan holds."""
    return sum(2.0 * segment.adapted * num_tokens for segment in skeleton.segments)


def rerun_flops(
    skeleton: Skeleton, layer: LayerPlan, num_tokens: int, num_pairs: int, *, by_chunk: bool = False
) -> float:
    """FLOPs that one block runs again in backward for one row, all its documents together; adapters run again always.

    Where attention runs again on a part of the tokens, that part's share of the pairs is that of one causal document.
    """
    if by_chunk:
        skeleton = chunk_skeleton(skeleton)
    square = max(1, num_tokens * num_tokens)
    return adapter_flops(skeleton, num_tokens) + sum(
        run.segment.flops(run.span[1] - run.span[0], num_pairs * (run.span[1] ** 2 - run.span[0] ** 2) // square)
        for run in all_reruns(schedule_of(skeleton), layer, num_tokens)
    )


def step_flops(
    model: ModelConfig,
    lengths: Sequence[int],
    *,
    causal: bool,
    adapter: AdapterConfig = NO_ADAPTER,
    prefixes: Sequence[int] = (),
) -> float:
    """FLOPs of forward and backward over documents of these lengths, where nothing runs again.

        3 (blocks + head); fewer with an adapter, see above

    Args:
        lengths: tokens of every document; attention does not cross documents.
        causal: count causal_pairs, else full_pairs.
        prefixes: as of MicroBatch: a prompt that several documents continue counts once.
    """
    num_tokens, num_pairs = sum(lengths), _pairs(model, lengths, prefixes, causal=causal)
    blocks = sum(blocks_flops(block_skeletons(model, adapter), num_tokens, num_pairs))
    head = head_flops(model, num_tokens) * (2 if adapter.is_on else 1 + BACKWARD_OVER_FORWARD)
    return blocks + head


def again_flops(
    model: ModelConfig, batch: MicroBatch, adapter: AdapterConfig = NO_ADAPTER, *, causal: bool = True
) -> float:
    """FLOPs that the plan makes a rank's blocks run again for one micro-batch: those of a mean row, times its rows."""
    by_chunk, skeletons = batch.plan.sweep is Sweep.by_chunk, block_skeletons(model, adapter)
    # A plan by layer places tensors by the tokens of one rank; chunks are of whole rows.
    num_shares = batch.num_rows * (1 if by_chunk else batch.num_sharers)
    num_tokens = sum(batch.lengths) // num_shares
    num_pairs = _pairs(model, batch.lengths, batch.prefixes, causal=causal) // num_shares
    counts = Counter(zip(batch.plan.cuts.skeletons(skeletons), batch.plan.layers, strict=True))
    again = sum(
        count * rerun_flops(skeleton, layer, num_tokens, num_pairs, by_chunk=by_chunk)
        for (skeleton, layer), count in counts.items()
    )
    if by_chunk:
        again += populating_flops(skeletons, batch.plan, num_tokens, num_pairs)
        again -= skipped_flops(skeletons, batch.plan, num_tokens, num_pairs)
        again /= batch.num_sharers
    return batch.num_rows * again


def populating_flops(skeletons: Sequence[Skeleton], plan: MemoryPlan, num_tokens: int, num_pairs: float) -> float:
    """FLOPs of stage 1 of the sweep by chunk, for one row: a forward of all chunks but the last one.

    Of the last layer it makes keys and values, or a state, only, which are not counted.

    Args:
        num_pairs: (query, key) pairs of the whole row; the chunks' share of them is that of one causal document.
    """
    chunks = plan.cuts.chunk_spans(num_tokens)
    begin, end = chunks[-1]
    pairs = num_pairs * (begin / end) ** 2
    if plan.pages is not None:
        pairs = min(pairs, pairs_seen(plan.cuts, plan.pages, chunks[:-1]))
    return blocks_flops(skeletons[:-1], begin, pairs)[0]


def skipped_flops(skeletons: Sequence[Skeleton], plan: MemoryPlan, num_tokens: int, num_pairs: float) -> float:
    """FLOPs of one row that page-sparse attention leaves out, forward and backward; as if it were one document."""
    if plan.pages is None:
        return 0.0
    seen = pairs_seen(plan.cuts, plan.pages, plan.cuts.chunk_spans(num_tokens))
    return sum(blocks_flops(skeletons, 0, max(0.0, num_pairs - seen)))


def mfu(
    model: ModelConfig,
    micro_batches: Iterable[MicroBatch],
    *,
    step_s: float,
    peak_flops: float,
    adapter: AdapterConfig = NO_ADAPTER,
) -> dict[str, float]:
    """Model and hardware FLOPs utilisation of one step of one rank, in percent, and their peak, by metric name.

        perf/mfu_causal_pct          3 (L block_causal + head)                     what the model needs
        perf/mfu_full_attention_pct  3 (L block_full + head)                       the whole square, as PaLM counts
        perf/hfu_pct                 3 (L block_causal + head) + what runs again   what the plan makes run: without
                                                                                   the pairs that chunk_sparse skips

        each 100 x FLOPs / (step_s x peak_flops); L layers; what runs again as rebuild.py says
        perf/mfu_peak_tflops         peak_flops / 1e12
        (PaLM: Chowdhery et al. 2022, arXiv 2204.02311, appendix B)

    With a sliding window the first and third count min(i + 1, window) keys for query i, the second min(n, window).
    What a kernel recomputes inside itself (flash attention's backward, loss tiles) counts in none. Never compare across
    formulas: at long context they differ by up to a factor of two.

    Args:
        micro_batches: of this rank's step.
        step_s: wall seconds of the step.
        peak_flops: FLOP/s of the rank's device that count as 100 %.

    Raises:
        InputError: step_s or peak_flops is not positive.
    """
    for key, value in {"step_s": step_s, "peak_flops": peak_flops}.items():
        if not value > 0.0:
            raise InputError(f"{key}={value}: a utilisation needs a positive number")
    micro_batches = list(micro_batches)
    needed, full = (
        sum(
            step_flops(model, batch.lengths, causal=causal, adapter=adapter, prefixes=batch.prefixes)
            / batch.num_sharers
            for batch in micro_batches
        )
        for causal in (True, False)
    )
    flops = {
        names.MFU_CAUSAL_PCT: needed,
        names.MFU_FULL_ATTENTION_PCT: full,
        names.HFU_PCT: needed + sum(again_flops(model, batch, adapter) for batch in micro_batches),
    }
    shares = {name: 100.0 * value / (step_s * peak_flops) for name, value in flops.items()}
    return {**shares, names.MFU_PEAK_TFLOPS: peak_flops / 1e12}
