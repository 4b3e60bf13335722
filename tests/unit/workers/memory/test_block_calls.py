"""What a block costs the host under the sweep by layer, in calls."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType

import torch

import headrace
from headrace.helpers.tiny_models import LLAMA
from headrace.workers.memory.policy import apply_memory, skeletons_of
from headrace.workers.memory.presets import preset_plan
from headrace.workers.model.decoder import Decoder

SEQ_LEN = 29
# Python functions of ours that one block calls with everything held.
FORWARD_CALLS, BACKWARD_CALLS = 190, 310


def test_a_block_takes_few_calls() -> None:
    """Python functions of ours that run for one more block. A time would say nothing on a busy host."""
    ours = tuple(str(Path(headrace.__path__[0]).joinpath(layer).resolve()) for layer in ("workers", "kernels"))
    counts: list[tuple[int, int]] = []
    for num_layers in (2, 3):
        model = Decoder(replace(LLAMA, num_layers=num_layers))
        model.init_weights(0)
        handle = apply_memory(model.blocks, preset_plan("keep", skeletons_of(model.blocks)))
        tokens = torch.arange(SEQ_LEN)[None]
        for step in range(2):
            handle.begin(step)
            with calls_of(ours) as forward:
                total = model.hidden_states(tokens).sum()
            with calls_of(ours) as backward:
                total.backward()
            handle.end()
        counts.append((len(forward), len(backward)))
    forward_calls, backward_calls = (more - less for less, more in zip(*counts, strict=True))
    assert forward_calls <= FORWARD_CALLS
    assert backward_calls <= BACKWARD_CALLS


@contextmanager
def calls_of(folders: tuple[str, ...]) -> Iterator[list[str]]:
    """The names of the Python functions in these folders that are called."""
    found: list[str] = []

    def see(frame: FrameType, event: str, arg: object) -> None:
        if event == "call" and str(Path(frame.f_code.co_filename).resolve()).startswith(folders):
            found.append(frame.f_code.co_name)

    sys.setprofile(see)
    try:
        yield found
    finally:
        sys.setprofile(None)
