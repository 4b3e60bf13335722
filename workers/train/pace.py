"""How far a step is, told for every layer and chunk: a step may take many minutes, and a hanging rank must be found."""

from __future__ import annotations

from dataclasses import replace

from headrace.workers.telemetry.records import OnStage, Stage, StepPart


class Pace:
    """Calls on_stage from inside a step. By layer every block is a part; by chunk every chunk is.

    Args:
        num_layers: of the model.
    """

    def __init__(self, on_stage: OnStage, num_layers: int) -> None:
        self._tell, self._num_layers = on_stage, num_layers
        self._stage = Stage.compute
        self._part = StepPart(1, 1, 0, num_layers, "layer")
        self._is_by_chunk = False

    def begin(self, stage: Stage, micro_batch: int, num_micro_batches: int) -> None:
        """A micro-batch begins, counted from 0."""
        self._stage, self._is_by_chunk = stage, False
        num_stages = 1 if stage is Stage.evaluate else 2
        self._part = StepPart(1, num_stages, 0, self._num_layers, "layer", micro_batch + 1, num_micro_batches)

    def on_chunk(self, stage: int, number: int, total: int) -> None:
        """The sweep by chunk begins a chunk of a stage."""
        self._is_by_chunk = True
        self._part = replace(self._part, stage=stage, number=number, total=total, unit="chunk")
        self._tell(self._stage, self._part)

    def on_block(self, layer: int, is_backward: bool) -> None:
        """The work of a block begins. Inside a chunk it is only a sign of life."""
        if not self._is_by_chunk:
            number = self._num_layers - layer if is_backward else layer + 1
            self._part = replace(self._part, stage=1 + is_backward, number=number)
        self._tell(self._stage, self._part)
