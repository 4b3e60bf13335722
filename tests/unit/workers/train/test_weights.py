"""Where the first weights of a run are drawn."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from headrace.helpers.training import TINY_MODEL
from headrace.workers.train import weights
from headrace.workers.train.weights import build_model, fill_weights

CPU = torch.device("cpu")


@pytest.mark.parametrize("on_device", [False, True])
def test_the_device_draws_only_where_it_is_asked_to(on_device: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    config, drawn = replace(TINY_MODEL, vocab_size=64), []

    def draw(config, seed, device, *adapter, wanted):
        drawn.append(device.type)
        return ()

    monkeypatch.setattr(weights, "initial_weights", draw)
    fill_weights(build_model(config), config, seed=1, device=torch.device("meta"), on_device=on_device)
    assert drawn == (["meta"] if on_device else ["cpu"])
