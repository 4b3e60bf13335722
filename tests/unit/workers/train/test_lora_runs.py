"""Runs with adapters: what is trained and saved, resumed to the bit, sharded, exported, and continued."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from headrace.helpers.training import RecordedRun
from headrace.platform.cli.main import main
from headrace.storage.core.errors import InputError
from headrace.workers.job import TrainJob
from headrace.workers.memory.policy import MemoryHandle
from headrace.workers.model.config import AdapterConfig, AdapterKind
from headrace.workers.model.decoder import initial_weights
from headrace.workers.model.hf import save_pretrained
from headrace.workers.model.lora import is_adapter
from headrace.workers.model.peft_config import read_adapter_config
from headrace.workers.model.weight_files import WEIGHTS_FILE
from headrace.workers.train.config import Precision
from headrace.workers.train.model_state import read_model_state
from headrace.workers.train.state_files import StateReader

LORA = AdapterConfig(kind=AdapterKind.lora, rank=4, alpha=8.0, dropout=0.2, targets="q_proj,o_proj,down_proj")
SAVED = {"checkpoint": {"at_end": True}}
TWO = {"batch_size": 2, "micro_batches": 2}


@pytest.fixture(scope="module")
def whole(job, run_job) -> tuple[TrainJob, RecordedRun]:
    """Four steps over random frozen weights, everything kept."""
    made = job(adapter=LORA, train=TWO, **SAVED)
    return made, run_job(made)


@pytest.fixture(scope="module")
def onto_folder(tmp_path_factory: pytest.TempPathFactory, job, run_job) -> tuple[TrainJob, Path]:
    """Two steps over the frozen weights of a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("hf") / "trunk"
    save_pretrained(initial_weights(job().model, 5), job().model, folder)
    made = job(adapter=LORA, model={"init_from": str(folder)}, optim={"lr": 0.05}, train={"steps": 2}, **SAVED)
    run_job(made)
    return made, folder


def losses(run: RecordedRun) -> list[float]:
    return [report.metrics["loss/train"] for report in run.reports]


def weights(made: TrainJob) -> dict[str, torch.Tensor]:
    return dict(read_model_state(made.run_dir).tensors)


def stored_names(made: TrainJob, step: int) -> set[str]:
    return set(StateReader(Path(made.run_dir) / "checkpoints" / f"step_{step:06d}" / "state").shapes())


def test_only_adapters_are_trained_and_saved_with_moments(whole) -> None:
    made, _ = whole
    first, last = dict(initial_weights(made.model, made.train.seed, adapter=LORA)), weights(made)
    for name, value in first.items():
        assert torch.equal(last[name], value) != is_adapter(name), name
    assert read_model_state(made.run_dir).adapter == LORA
    moments = {f"optim.{n}.{kind}" for n in first if is_adapter(n) for kind in ("exp_avg", "exp_avg_sq")}
    assert stored_names(made, 4) == moments | {f"model.{name}" for name in first}


def test_a_stopped_run_under_another_plan_goes_on_as_the_whole_one(whole, job, run_job, leases) -> None:
    part = job(adapter=LORA, memory="offload_host", train=TWO, **SAVED)
    runs = [run_job(part, stop_after=2, leases=leases), run_job(part, leases=leases)]
    assert [loss for run in runs for loss in losses(run)] == losses(whole[1])
    ours, theirs = weights(part), weights(whole[0])
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_mutant_micro_batches_with_equal_masks_are_seen(whole, job, run_job, monkeypatch: pytest.MonkeyPatch) -> None:
    begin = MemoryHandle.begin

    def same_rows(self: MemoryHandle, step: int, micro_batch: int = 0, *, seed: int = 0, row: int = 0) -> None:
        begin(self, step, micro_batch, seed=seed)

    monkeypatch.setattr(MemoryHandle, "begin", same_rows)
    found = losses(run_job(job(adapter=LORA, train=TWO), stop_after=2))
    assert found != pytest.approx(losses(whole[1])[:2], rel=1e-5)


def test_bf16_computes_adapters_too(whole, job, run_job) -> None:
    found = losses(run_job(job(adapter=LORA, train={**TWO, "precision": Precision.bf16}), stop_after=2))
    assert found == pytest.approx(losses(whole[1])[:2], rel=2e-2)


def test_a_trunk_in_a_folder_is_named_and_not_saved(onto_folder, run_job, tmp_path) -> None:
    made, folder = onto_folder
    names = stored_names(made, 2)
    assert all(is_adapter(name.removesuffix(".exp_avg").removesuffix(".exp_avg_sq")) for name in names)
    kept = dict(read_model_state(made.run_dir).trunk)
    assert all(torch.equal(kept[name], value) for name, value in initial_weights(made.model, 5))

    right = (folder / WEIGHTS_FILE).read_bytes()
    save_pretrained(initial_weights(made.model, 6), made.model, tmp_path / "other")
    try:
        shutil.copy(tmp_path / "other" / WEIGHTS_FILE, folder)
        with pytest.raises(InputError, match="digest"):
            _ = read_model_state(made.run_dir).trunk
        with pytest.raises(InputError, match="digest"):
            run_job(replace(made, train=replace(made.train, steps=3)))
    finally:
        (folder / WEIGHTS_FILE).write_bytes(right)


def test_export_merge_generate_and_go_on(onto_folder, job, run_job, tmp_path, capsys) -> None:
    made, folder = onto_folder
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    assert main(["export", f"run={made.run_dir}", f"out={adapter}", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert facts["num_params"] == sum(v.numel() for _, v in read_model_state(made.run_dir).adapters)
    assert main(["export", f"run={made.run_dir}", f"out={merged}", "merge=true"]) == 0
    read = read_adapter_config(adapter)
    assert replace(read, init_from=None) == LORA
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == str(folder)

    capsys.readouterr()
    said = []
    for source in (f"run={made.run_dir}", f"hf={merged}"):
        assert main(["generate", source, "--prompt", "the river", "temperature=0", "max_new_tokens=12"]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]

    onward = job(adapter=read, model={"init_from": str(folder)}, optim={"lr": 1e-12}, train={"steps": 1}, **SAVED)
    run_job(onward)
    ours, theirs = (dict(read_model_state(m.run_dir).adapters) for m in (onward, made))
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-9) for name in theirs)


def test_merge_of_a_run_without_adapters_is_refused(job, run_job, tmp_path, capsys) -> None:
    made = job(train={"steps": 0}, **SAVED)
    run_job(made)
    assert main(["export", f"run={made.run_dir}", f"out={tmp_path / 'x'}", "merge=true"]) == 2
    assert "merge=true" in capsys.readouterr().err
