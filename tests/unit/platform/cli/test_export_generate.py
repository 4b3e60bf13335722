"""`headrace export` and `headrace generate` on a run that was trained for a few steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from headrace.helpers.training import tiny_job
from headrace.platform.cli.main import main
from headrace.workers.job import RankContext
from headrace.workers.model.decoder import Decoder
from headrace.workers.model.sharded import copy_weights
from headrace.workers.train.model_state import read_model_state
from headrace.workers.train.session import run_rank

PROMPT = "the river turns"


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    job = tiny_job(
        tmp_path_factory.mktemp("exported"),
        train={"steps": 2},
        checkpoint={"every": 1, "at_end": True, "keep": 3},
        model={"init_std": 0.2},
    )
    run_rank(job, RankContext(), on_step=lambda report: None, should_stop=lambda: False)
    return Path(job.run_dir)


def answer(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    """Run a verb that succeeds and read its last line."""
    assert main([*argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def refusal(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """Run a verb that refuses its input and read why."""
    assert main(list(argv)) == 2
    return capsys.readouterr().err


def test_export_loads_in_transformers_with_the_weights_of_the_run(run_dir: Path, tmp_path: Path, capsys) -> None:
    transformers = pytest.importorskip("transformers")
    facts = answer(capsys, "export", f"run={run_dir}", f"out={tmp_path / 'hf'}")
    assert facts["has_tokenizer"]
    assert facts["dtype"] == "float32"
    saved = read_model_state(run_dir)
    config, state = saved.config, saved.tensors
    ours = Decoder(config)
    copy_weights(ours, state)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    tokens = tokenizer(PROMPT, return_tensors="pt").input_ids
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, rtol=1e-4, atol=1e-5)
    assert theirs.config.eos_token_id == tokenizer.eos_token_id is not None


def test_an_answer_is_drawn_and_drawn_again_alike(run_dir: Path, capsys) -> None:
    words = ("generate", f"run={run_dir}", "--prompt", PROMPT, "max_new_tokens=12")
    said = answer(capsys, *words, "temperature=0.8", "top_p=0.95", "seed=0")["tokens"]
    assert answer(capsys, *words)["tokens"] == said
    assert answer(capsys, *words, "seed=1")["tokens"] != said
    assert answer(capsys, *words, "temperature=0")["tokens"] == answer(capsys, *words, "top_k=1")["tokens"] != said


def test_generate_from_the_run_and_from_its_export_and_in_transformers(run_dir: Path, tmp_path: Path, capsys) -> None:
    transformers = pytest.importorskip("transformers")
    hf = tmp_path / "hf"
    answer(capsys, "export", f"run={run_dir}", f"out={hf}")
    words = ("--prompt", PROMPT, "max_new_tokens=12", "temperature=0")
    from_run = answer(capsys, "generate", f"run={run_dir}", *words)
    from_hf = answer(capsys, "generate", f"hf={hf}", *words)
    assert from_run["tokens"] == from_hf["tokens"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(hf)
    prompt = tokenizer(PROMPT, return_tensors="pt").input_ids
    assert from_run["num_prompt_tokens"] == prompt.shape[1]
    model = transformers.AutoModelForCausalLM.from_pretrained(hf)
    theirs = model.generate(prompt, max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert theirs[0, prompt.shape[1] :].tolist() == from_run["tokens"]
    assert main(["generate", f"hf={hf}", *words]) == 0
    assert capsys.readouterr().out == PROMPT + from_run["text"] + "\n"


def test_step_and_dtype_are_what_was_asked_for(run_dir: Path, tmp_path: Path, capsys) -> None:
    from safetensors.torch import load_file

    for step in (1, 2):
        out = tmp_path / f"step{step}"
        answer(capsys, "export", f"run={run_dir}", f"out={out}", f"step={step}", "dtype=bf16")
        expected = dict(read_model_state(run_dir, step).tensors)["norm.weight"].bfloat16()
        assert torch.equal(load_file(out / "model.safetensors")["model.norm.weight"], expected)
        assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    first, second = (dict(read_model_state(run_dir, step).tensors)["lm_head.weight"] for step in (1, 2))
    assert not torch.equal(first, second)


def test_words_of_the_makefile(run_dir: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADRACE_OVERRIDES", "max_new_tokens=3 temperature=0.9 top_p=0.8 seed=4")
    facts = answer(capsys, "generate", f"run={run_dir}", "--prompt", "--json is a word; run=this too")
    assert facts["prompt"] == "--json is a word; run=this too"
    assert len(facts["tokens"]) <= 3


def test_bad_input_is_named(run_dir: Path, tmp_path: Path, capsys) -> None:
    run = f"run={run_dir}"
    assert "did you mean `max_new_tokens`" in refusal(capsys, "generate", run, "--prompt", "x", "max_new_token=3")
    assert "did you mean `--json`" in refusal(capsys, "generate", run, "--prompt", "x", "--jsn")
    assert "max_new_tokens=many: a whole number" in refusal(
        capsys, "generate", run, "--prompt", "x", "max_new_tokens=many"
    )
    assert "twice" in refusal(capsys, "generate", run, "--prompt", "x", "seed=1", "seed=2")
    assert "has no value" in refusal(capsys, "generate", run, "--prompt", "x", "seed=")
    assert "KEY=VALUE" in refusal(capsys, "generate", run, "--prompt", "x", "seed")
    assert "prompt is missing" in refusal(capsys, "generate", run)
    assert "--prompt has no text" in refusal(capsys, "generate", run, "--prompt")
    assert "either run=DIR or hf=DIR" in refusal(capsys, "generate", "--prompt", "x")
    assert "either run=DIR or hf=DIR" in refusal(capsys, "generate", run, f"hf={tmp_path}", "--prompt", "x")
    assert "leave it out" in refusal(capsys, "generate", f"hf={tmp_path}", "step=1", "--prompt", "x")
    assert "dtype=fp8" in refusal(capsys, "generate", run, "--prompt", "x", "dtype=fp8")
    assert "config.json" in refusal(capsys, "generate", f"hf={tmp_path}", "--prompt", "x")
    if not torch.cuda.is_available():
        assert "no CUDA device" in refusal(capsys, "generate", run, "--prompt", "x", "device=cuda")
    assert "out=DIR is missing" in refusal(capsys, "export", run)
    assert "did you mean `out`" in refusal(capsys, "export", run, "outt=x")
    (tmp_path / "there").mkdir()
    assert "exists already" in refusal(capsys, "export", run, f"out={tmp_path / 'there'}")
    assert str(tmp_path) in refusal(capsys, "export", f"run={tmp_path}", f"out={tmp_path / 'new'}")
    assert str(9) in refusal(capsys, "export", run, f"out={tmp_path / 'new'}", "step=9")
    assert [entry.name for entry in tmp_path.iterdir()] == ["there"]


@pytest.mark.parametrize("verb", ["export", "generate"])
def test_help(verb: str, capsys) -> None:
    assert main([verb, "--help"]) == 0
    assert f"usage: headrace {verb}" in capsys.readouterr().out


def test_a_prompt_is_no_question_for_help(capsys) -> None:
    assert "give either run=DIR" in refusal(capsys, "generate", "--prompt", "--help")
