"""Two ranks start from a Hugging Face folder: each takes its part of every tensor."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from headrace.helpers.training import TINY_MODEL, plan_for, run_distributed
from headrace.storage.core.errors import InputError
from headrace.workers.job import RankContext
from headrace.workers.model.config import ModelConfig
from headrace.workers.model.decoder import Decoder
from headrace.workers.model.hf import save_pretrained
from headrace.workers.parallel.apply import parallelize
from headrace.workers.parallel.process_group import pick_device, process_group
from headrace.workers.train.config import Precision
from headrace.workers.train.weights import build_model, fill_weights


def filled(context: RankContext, configs: list[ModelConfig]) -> list[dict[str, torch.Tensor] | str]:
    """Per configuration, every parameter of the sharded model, gathered; or why there is none."""
    torch.set_num_threads(1)
    device = pick_device(context)
    with process_group(context, device):
        mesh = dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
        return [gathered(config, mesh, device) for config in configs]


def gathered(
    config: ModelConfig, mesh: dist.device_mesh.DeviceMesh, device: torch.device
) -> dict[str, torch.Tensor] | str:
    model = build_model(config)
    parallelize(model, mesh=mesh, precision=Precision.fp32, plan=plan_for("keep", config))
    try:
        fill_weights(model, config, seed=0, device=device)
    except InputError as error:
        return str(error)
    params = dict(model.named_parameters())
    assert all(isinstance(param, DTensor) for param in params.values())
    return {name: param.full_tensor().detach().clone() for name, param in params.items()}


@pytest.mark.slow
def test_sharded_models_from_folders(tmp_path: Path) -> None:
    models, configs = [], []
    for tied in (False, True):
        config = replace(TINY_MODEL, vocab_size=51, tie_embeddings=tied)  # 51 rows do not divide by two
        models.append(Decoder(config))
        models[-1].init_weights(5)
        folder = tmp_path / f"tied_{tied}"
        save_pretrained(models[-1].named_parameters(), config, folder, max_shard_bytes=20_000)
        configs.append(replace(config, init_from=str(folder)))
    other = replace(configs[0], intermediate_size=65)
    for *answers, refused in run_distributed(partial(filled, configs=[*configs, other]), 2):
        for model, params in zip(models, answers, strict=True):
            assert list(params) == [name for name, _ in model.named_parameters()]
            assert all(torch.equal(params[name], param) for name, param in model.named_parameters())
        assert "gate_proj.weight has shape (64, 32), the model needs (65, 32)" in refused
