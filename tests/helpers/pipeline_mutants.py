"""Pipelines that are broken on purpose, by the name of the fault."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch

from headrace.kernels.loss.rows import RowStatistics
from headrace.workers.memory.layer_sweep import BlockCall
from headrace.workers.memory.weight_queue import WeightQueue
from headrace.workers.parallel.pipeline import actions, by_stage, vocabulary
from headrace.workers.parallel.pipeline.actions import Action, Op
from headrace.workers.parallel.pipeline.by_stage import ByStage, PipelineRank
from headrace.workers.parallel.pipeline.messages import Messages
from headrace.workers.parallel.pipeline.vocabulary import SharedVocabulary


def wrong_order(num_layers: int, num_stages: int) -> list[range]:
    """The blocks of the last stage first."""
    return actions.stage_layers(num_layers, num_stages)[::-1]


def stale(self: Messages, action: Action) -> torch.Tensor:
    """What came before."""
    newest = receive(self, action)
    key = action.op, action.stage
    seen = self.__dict__.setdefault("seen", {})
    older = seen.get(key, newest)
    seen[key] = newest
    return older


receive = Messages.receive
run_products, weight_later, own_stage = WeightQueue.run, BlockCall._weight_later, PipelineRank.of_stage


def run_twice(self: WeightQueue, stage: int, micro_batch: int) -> None:
    """The products that wait run again."""
    again = [replace(product) for product in self._waiting[stage, micro_batch]]
    run_products(self, stage, micro_batch)
    self._waiting[stage, micro_batch] = again
    run_products(self, stage, micro_batch)


def written_to(self: BlockCall, rule: Any, x: Any, rows: Any, tile: Any, *, is_kept: bool) -> None:
    """What waits is not copied."""
    weight_later(self, rule, x, rows, tile, is_kept=True)


SPLIT_MUTANTS: dict[str, tuple[Any, str, Any]] = {
    "a W is lost": (WeightQueue, "run", lambda self, stage, micro_batch: self._waiting.pop((stage, micro_batch))),
    "a W runs twice": (WeightQueue, "run", run_twice),
    "a gradient that waits is written to": (BlockCall, "_weight_later", written_to),
    "a rank has its two stages swapped": (PipelineRank, "of_stage", lambda self, stage: own_stage(self, 3 - stage)),
}
rows_back, embedding_back, merge = SharedVocabulary._rows_back, SharedVocabulary._embedding_back, vocabulary.merged


def one_row_pass_less(self: SharedVocabulary, own: Any) -> None:
    """The T of micro-batch 1 is left out."""
    if own.number != 1:
        rows_back(self, own)


def same_maximum(parts: list[RowStatistics]) -> Any:
    """All ranks have the first one's maximum."""
    return merge([parts[0], *(part._replace(max=parts[0].max) for part in parts[1:])])


def twice(self: SharedVocabulary, own: Any) -> None:
    """The look-up's gradient is added again."""
    posted = own.posted[Op.embedding_grad]
    embedding_back(self, own)
    own.posted[Op.embedding_grad] = posted
    embedding_back(self, own)


SHARED_MUTANTS: dict[str, tuple[Any, str, Any]] = {
    "a T is lost": (SharedVocabulary, "_rows_back", one_row_pass_less),
    "a rank's maximum is ignored": (vocabulary, "merged", same_maximum),
    "a tied gradient counts twice": (SharedVocabulary, "_embedding_back", twice),
}
MUTANTS: dict[str, tuple[Any, str, Any]] = {
    "stages in the wrong order": (by_stage, "stage_layers", wrong_order),
    "gradients of a tied weight are not summed": (ByStage, "_add_up_tied", lambda self: None),
    "a stage takes another micro-batch": (Messages, "receive", stale),
}


@contextmanager
def broken(mutant: str) -> Iterator[None]:
    """With the fault of this name; an empty name breaks nothing."""
    with ExitStack() as patches:
        if mutant:
            target, name, value = (MUTANTS | SPLIT_MUTANTS | SHARED_MUTANTS)[mutant]
            patches.enter_context(patch.object(target, name, value))
        yield
