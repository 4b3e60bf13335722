"""The reference itself: no cast to fp32 hides in it, and what it refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from headrace.storage.core.errors import InputError
from headrace.workers.verify.batches import random_batches
from headrace.workers.verify.compare import gradient_errors
from headrace.workers.verify.config import VerifyConfig
from headrace.workers.verify.oracle import Oracle, load_oracle, mean_loss, oracle_steps

CPU = torch.device("cpu")
MakeFolder = Callable[..., Path]


def watch(mode: Any, model: torch.nn.Module, batches: Any) -> list[str]:
    rotary = model.model.rotary_emb  # type: ignore[union-attr]
    rotary.register_forward_pre_hook(lambda *_: setattr(mode, "is_allowed", True))
    rotary.register_forward_hook(lambda *_: setattr(mode, "is_allowed", False))
    with mode:
        mean_loss(model, batches).backward()
    return mode.found


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_nothing_but_the_rope_table_is_narrower_than_fp64(
    make_folder: MakeFolder, narrow_tensors: Callable[[], Any], family: str
) -> None:
    folder = make_folder(family)
    config = VerifyConfig(hf=str(folder), seq_len=16, batch=2)
    (batches,) = random_batches(config, 97, 0)
    assert watch(narrow_tensors(), load_oracle(folder, Oracle.fp64, CPU), batches) == []
    # the watch sees transformers' own casts
    plain = load_oracle(folder, Oracle.fp32, CPU).double()
    assert any("_to_copy" in found for found in watch(narrow_tensors(), plain, batches))


def test_fp64_of_bf16_holds_the_rounded_weights(make_folder: MakeFolder) -> None:
    folder = make_folder("qwen2")
    rounded = load_oracle(folder, Oracle.fp64_of_bf16, CPU)
    exact = dict(load_oracle(folder, Oracle.fp64, CPU).named_parameters())
    differ = 0
    for name, param in rounded.named_parameters():
        assert param.dtype is torch.float64
        assert torch.equal(param, exact[name].bfloat16().double())
        differ += int(not torch.equal(param, exact[name]))
    assert differ > 5
    tables = [m.model.rotary_emb.inv_freq.float() for m in (rounded, load_oracle(folder, Oracle.fp64, CPU))]  # type: ignore[union-attr]
    assert torch.equal(*tables)


def test_the_patch_is_needed_and_changes_nothing_else(make_folder: MakeFolder) -> None:
    folder = make_folder("llama")
    config = VerifyConfig(hf=str(folder), seq_len=16)
    (batches,) = random_batches(config, 97, 0)
    patched = load_oracle(folder, Oracle.fp64, CPU)
    plain = load_oracle(folder, Oracle.fp32, CPU).double()
    grads = []
    for model in (plain, patched):
        mean_loss(model, batches).backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    whole = gradient_errors(*grads).whole
    assert 1e-9 < whole < 1e-5


def test_documents_one_by_one_equal_transformers_own_packing(make_folder: MakeFolder) -> None:
    folder = make_folder("qwen3")
    config = VerifyConfig(hf=str(folder), seq_len=32, documents=4)
    (batches,) = random_batches(config, 97, 3)
    model = load_oracle(folder, Oracle.fp64, CPU)
    (batch,) = batches
    positions = torch.cat([torch.arange(length) for length in batch.packing.lengths])[None]
    logits = model(input_ids=batch.tokens, position_ids=positions, use_cache=False).logits
    theirs = F.cross_entropy(logits[0], batch.targets[0], ignore_index=-100)
    assert abs((mean_loss(model, batches) - theirs).item()) < 1e-14
    whole = F.cross_entropy(model(input_ids=batch.tokens).logits[0], batch.targets[0], ignore_index=-100)
    assert abs((whole - theirs).item()) > 1e-6


def test_batches_are_seeded_and_leave_out_targets_of_other_documents() -> None:
    config = VerifyConfig(hf="x", seq_len=16, batch=2, documents=3, micro_batches=2, steps=2)
    steps = random_batches(config, 11, 5)
    again = random_batches(config, 11, 5)
    assert [len(batches) for batches in steps] == [2, 2]
    assert steps[0][0].num_targets == 2 * (16 - 2) > steps[0][1].num_targets > 2
    for batches, others in zip(steps, again, strict=True):
        for batch, other in zip(batches, others, strict=True):
            assert torch.equal(batch.tokens, other.tokens)
            assert torch.equal(batch.targets, other.targets)
            batch.packing.check(2, 16)
            assert len(batch.packing.lengths) == 6
            inner = [b for b in batch.packing.cu_seqlens.tolist()[1:] if b % 16]
            assert all(batch.targets.flatten()[b - 1] == -100 for b in inner)
            kept = batch.targets[:, :-1] != -100
            assert torch.equal(batch.targets[:, :-1][kept], batch.tokens[:, 1:][kept])
    assert not torch.equal(steps[0][0].tokens, random_batches(config, 11, 6)[0][0].tokens)
    assert not torch.equal(steps[0][0].tokens, steps[1][0].tokens)


def test_refused_folders(make_folder: MakeFolder, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(make_folder("llama"), broken)
    weights = load_file(broken / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        load_oracle(broken, Oracle.fp64, CPU)
    (broken / "model.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(InputError, match="cannot load"):
        load_oracle(broken, Oracle.fp64, CPU)
    (broken / "config.json").write_text(json.dumps({"model_type": "no_such_model"}))
    with pytest.raises(InputError, match="cannot load"):
        load_oracle(broken, Oracle.fp64, CPU)


def test_two_steps_move_the_weights(make_folder: MakeFolder) -> None:
    folder = make_folder("llama")
    config = VerifyConfig(hf=str(folder), seq_len=16, steps=2)
    first, second = oracle_steps(folder, Oracle.fp64, random_batches(config, 97, 0), 1e-2, CPU)
    (batch,) = random_batches(config, 97, 0)[1]
    (alone,) = oracle_steps(folder, Oracle.fp64, [[batch]], 1e-2, CPU)
    assert first.grads.keys() == second.grads.keys()
    assert gradient_errors(second.grads, alone.grads).whole > 1e-3
