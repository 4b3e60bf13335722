"""The headline benchmark: what it measures, that a child answers, and that failures are rows. Cases run on CPU here."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from headrace.bench import gpu_case, gpu_headline
from headrace.bench.gpu_case import Case, System, Weights
from headrace.bench.harness import Row
from headrace.bench.model_shapes import model_shape
from headrace.storage.core.errors import InputError
from headrace.workers.data.opening import open_prepared
from headrace.workers.model.adapter import num_params


def options(**changes):
    return {**gpu_headline.OPTIONS, **changes}


def test_default_cases_are_the_promised_rows():
    found = gpu_headline.cases(options())
    assert {(c.model, c.seq_len) for c in found} == {
        (model, n) for model in ("qwen2_5_0_5b", "qwen2_5_7b") for n in (16384, 32768)
    }
    per_shape = [(c.system, c.weights) for c in found if (c.model, c.seq_len) == ("qwen2_5_7b", 32768)]
    assert len(per_shape) == len(set(per_shape)) == 6
    assert all(c.peak_flops == 989.4e12 for c in found)
    first = found[0]
    assert (first.model, first.seq_len, first.system.value) == ("qwen2_5_7b", 32768, "headrace_offload_host")
    lighter = gpu_headline.cases(options(weights="bf16"))
    assert {(c.system.is_ours, c.weights) for c in lighter} == {(False, Weights.bf16)}
    assert not any(c.system.is_ours and c.weights is Weights.bf16 for c in found)


def test_case_survives_its_trip_to_the_child():
    case = Case(System.transformers_offload, "tiny", 128, "folder", Weights.bf16, steps=3, device="cpu")
    assert Case.from_json(case.to_json()) == case


def test_every_system_names_a_preset_that_exists():
    presets = {"recompute", "offload_host", "offload_ssd"}
    assert {system.preset for system in System} <= presets
    assert System.transformers_offload.preset == "offload_host"
    assert System.headrace_offload_ssd.preset == "offload_ssd"


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"systems": "deepspeed"}, "deepspeed"),
        ({"lengths": "16k"}, "16k"),
        ({"models": "gpt5"}, "gpt5"),
        ({"weights": "int8"}, "int8"),
    ],
)
def test_wrong_options_are_named(change, word):
    with pytest.raises(InputError, match=word):
        gpu_headline.cases(options(**change))


def test_shape_of_a_model_file_is_the_published_one():
    shape = model_shape("qwen2_5_7b")
    assert (shape.num_layers, shape.hidden_size, shape.num_kv_heads) == (28, 3584, 4)
    assert num_params(shape) == 7_615_616_512


def test_ratio_compares_best_with_best_of_the_same_weights():
    def row(system, weights, speed, error=None):
        config = {"model": "m", "seq_len": 8, "system": system, "weights": weights}
        return Row(f"{system}/{weights}", {"tokens_per_s": speed}, config, error=error)

    rows = [
        row("headrace_recompute", "fp32", 90.0),
        row("headrace_offload_host", "fp32", 100.0),
        row("transformers_checkpoint", "fp32", 80.0),
        row("transformers_offload", "fp32", 999.0, error="out_of_memory"),
        row("transformers_checkpoint", "bf16", 200.0),
    ]
    same, lighter = gpu_headline.ratios(rows)
    assert same.numbers["tokens_per_s_ratio"] == pytest.approx(1.25)
    assert same.target is not None
    assert same.target.met
    assert lighter.numbers["tokens_per_s_ratio"] == pytest.approx(0.5)
    assert lighter.target is None


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return gpu_headline.one_document_rows(tmp_path_factory.mktemp("headline"), 64, 40)


def test_rows_that_are_there_are_taken(prepared):
    assert open_prepared(prepared, seq_len=64).num_rows >= 40
    before = {path: path.stat().st_mtime_ns for path in Path(prepared).iterdir()}
    (Path(prepared).parent / "library-64.txt").unlink()
    assert gpu_headline.one_document_rows(Path(prepared).parent, 64, 40) == prepared
    assert {path: path.stat().st_mtime_ns for path in Path(prepared).iterdir()} == before


def tiny(prepared, system, **more):
    return Case(system, "tiny", 64, prepared, steps=1, warmup=1, device="cpu", peak_flops=1e11, **more)


def test_rows_of_an_older_schema_are_made_again(tmp_path):
    folder = gpu_headline.one_document_rows(tmp_path, 64, 40)
    meta = Path(folder) / "meta.json"
    meta.write_text(meta.read_text().replace('"schema_version": ', '"schema_version": 9'))
    assert gpu_headline.one_document_rows(tmp_path, 64, 40) == folder
    assert open_prepared(folder, seq_len=64).num_rows >= 40


class RunHere:
    """Stands in for Child: the case runs in this process, which has imported what it needs."""

    failure = None

    def __init__(self, command, *, limit_s):
        self.begin_s, self.words = time.monotonic(), command[2:]

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def rows(self):
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
            patch.setattr(sys, "argv", self.words)
            gpu_case.main()
        return [json.loads(line) for line in printed.getvalue().splitlines() if line.startswith("{")]


@pytest.mark.slow
def test_both_systems_learn_from_the_same_rows(prepared, monkeypatch):
    *our_steps, ours = gpu_headline.measure(tiny(prepared, System.headrace_offload_host), 600.0)
    monkeypatch.setattr(gpu_headline, "Child", RunHere)
    *their_steps, theirs = gpu_headline.measure(tiny(prepared, System.transformers_checkpoint), 600.0)
    assert ours.error is None
    assert theirs.error is None
    for steps, row in ((our_steps, ours), (their_steps, theirs)):
        assert [step.name for step in steps] == [f"{row.name}/step1", f"{row.name}/step2"]
        assert [step.numbers["loss"] for step in steps] == [row.numbers["first_loss"], row.numbers["last_loss"]]
    assert "expandable_segments" in "".join(ours.config["allocator"].values())
    for row in (ours, theirs):
        assert row.numbers["tokens_per_s"] == pytest.approx(64 / row.numbers["step_s"])
        assert row.numbers["mfu_causal_pct"] < row.numbers["mfu_full_attention_pct"] < row.numbers["hfu_pct"]
        # Random weights know nothing: the loss is that of a guess among the vocabulary.
        assert 4.0 < row.numbers["first_loss"] < 9.0
    assert ours.config["tiers"]["tiers"]["host"]["stored_bytes"] > 0


def test_a_failing_case_is_a_row_with_its_reason(prepared, monkeypatch, capsys):
    monkeypatch.setattr(gpu_headline, "Child", RunHere)
    (row,) = gpu_headline.measure(tiny(prepared, System.headrace_recompute, weights=Weights.bf16), 600.0)
    assert "fp32 master weights" in row.error
    (late,) = gpu_headline.measure(tiny(prepared, System.headrace_recompute), 1.0)
    assert "not started" in late.error
    broken = replace(tiny(prepared, System.headrace_recompute), prepared="/nowhere")
    monkeypatch.setattr(sys, "argv", ["gpu_case", broken.to_json()])
    gpu_case.main()
    row = json.loads(capsys.readouterr().out)
    assert row["status"] == "failed"
    assert "nowhere" in row["error"]


def test_a_case_that_is_stopped_keeps_its_steps(prepared, tmp_path, monkeypatch):
    rows = [{"step": step, "step_s": float(step), "loss": 5.0} for step in (1, 2, 3, 4)]
    code = "".join(f"tell({row})\n" for row in rows)
    (tmp_path / "slow_case.py").write_text(
        f"import time\nfrom headrace.platform.children import tell\n{code}time.sleep(600)\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setattr(gpu_headline, "CASE", "slow_case")
    *steps, row = gpu_headline.measure(replace(tiny(prepared, System.headrace_recompute), warmup=2, steps=3), 12.0)
    assert [step.numbers["step_s"] for step in steps] == [1.0, 2.0, 3.0, 4.0]
    assert row.error == "stopped after 12 s"
    assert row.numbers["step_s"] == 3.5
    assert row.numbers["tokens_per_s"] == pytest.approx(64 / 3.5)


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED")],
    ids=["allocator", "library"],
)
def test_a_full_device_is_an_answer_with_its_peaks(error, prepared, monkeypatch, capsys):
    def full(case):
        raise error

    monkeypatch.setattr(gpu_case, "measure", full)
    monkeypatch.setattr(gpu_case, "memory_peaks", lambda device: {"peak_device_gib": 138.5})
    monkeypatch.setattr(sys, "argv", ["gpu_case", tiny(prepared, System.headrace_recompute).to_json()])
    gpu_case.main()
    row = json.loads(capsys.readouterr().out)
    assert (row["status"], row["peak_device_gib"]) == ("out_of_memory", 138.5)
    assert str(error) in row["error"]
