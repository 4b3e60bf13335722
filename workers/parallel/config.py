"""Parallel degrees, and how a pipeline runs. No torch, no Ray."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

# "1f1b" is no Python name, so this enum is made by a call.
PipelineSchedule = StrEnum(
    "PipelineSchedule", {"1f1b": "1f1b", "interleaved": "interleaved", "zbv": "zbv", "v_half": "v_half"}
)
ONE_F_ONE_B = PipelineSchedule("1f1b")
INTERLEAVED = PipelineSchedule("interleaved")
ZBV = PipelineSchedule("zbv")
V_HALF = PipelineSchedule("v_half")


class Vocabulary(StrEnum):
    """Where a pipeline computes look-up, logits and loss.

    `last_stage`: the look-up on the first stage, the head on the last. `vocab_1` and `vocab_2`: each rank has a part of
    the rows (Yeung et al. 2024, arXiv 2411.05288, algorithms 1 and 2). `auto`: last_stage.
    """

    auto = "auto"
    last_stage = "last_stage"
    vocab_1 = "vocab_1"
    vocab_2 = "vocab_2"


class RingLayout(StrEnum):
    """Which tokens of a row the ranks of a ring have.

    zigzag and striped cut every document by itself, so that all ranks have as many scores to compute.
    """

    auto = "auto"  # contiguous where the window is at most a rank's part of the row, else zigzag
    zigzag = "zigzag"  # 2 x ring pieces; rank r has pieces r and 2 x ring - 1 - r
    striped = "striped"  # 4 x ring pieces, dealt in turn
    contiguous = "contiguous"  # one piece of the row for every rank


@dataclass(kw_only=True, slots=True)
class ParallelConfig:
    """data x tensor x ulysses x ring x pipeline = number of ranks.

    Args:
        data: data-parallel degree; None means all ranks that the other degrees leave.
        fsdp: ranks a parameter is sharded over (of data x ulysses x ring); None means all of them.
        tensor: ranks that share the weights of every block, the rows of the vocabulary and, in norms, the tokens.
        ulysses: ranks that share the tokens of a row and, in attention, its heads.
        ring: ranks that share the tokens of a row and pass keys and values on in attention.
        ring_layout: which tokens each of them has.
        pipeline: ranks that have a part of the blocks each; a micro-batch passes them in turn.
        pipeline_schedule: order of the passes of a pipeline.
        pipeline_chunks: stages of one rank; None means what the schedule needs: 1 for 1f1b, else 2.
        vocabulary: see Vocabulary; it matters where pipeline is above 1.
    """

    data: int | None = None
    fsdp: int | None = None
    tensor: int = 1
    ulysses: int = 1
    ring: int = 1
    ring_layout: RingLayout = RingLayout.auto
    pipeline: int = 1
    pipeline_schedule: PipelineSchedule = ONE_F_ONE_B
    pipeline_chunks: int | None = None
    vocabulary: Vocabulary = Vocabulary.auto
