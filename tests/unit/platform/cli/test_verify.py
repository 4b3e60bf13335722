"""`headrace verify` as a user calls it: words, exit codes, one line of JSON, no torch before the words are checked."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from headrace.platform.cli.main import main
from headrace.platform.cli.verify import parse_words, with_recipe
from headrace.storage.core.errors import InputError
from headrace.workers.memory.config import MemoryPreset
from headrace.workers.parallel.config import ZBV
from headrace.workers.verify.config import VerifyConfig, VerifyDtype

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = transformers.Qwen2Config(
        vocab_size=61,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    out = tmp_path_factory.mktemp("model")
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(out)
    return out


def test_words_become_settings() -> None:
    words = ["hf=a=b", "dtype=bf16", "seq_len=1_024", "batch=2", "memory=offload_ssd", "seed=7", "lr=0.5"]
    wanted = VerifyConfig(
        hf="a=b", dtype=VerifyDtype.bf16, seq_len=1024, batch=2, memory=MemoryPreset.offload_ssd, seed=7, lr=0.5
    )
    assert parse_words(words) == wanted
    by_chunk = parse_words(["hf=a", "memory=chunk", "chunk_size=8", "responses=2"])
    assert by_chunk == VerifyConfig(hf="a", memory=MemoryPreset.chunk, chunk_size=8, responses=2)
    stages = parse_words(["hf=a", *(f"parallel.pipeline{what}" for what in ("=2", "_schedule=zbv"))])
    assert stages == VerifyConfig(hf="a", pipeline=2, pipeline_schedule=ZBV)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["hf=x", "seqlen=3"], "did you mean `seq_len`"),
        (["hf=x", "dtype=fp46"], "did you mean `fp64`"),
        (["hf=x", "seq_len=many"], "seq_len=many: a whole number"),
        (["hf=x", "lr=low"], "lr=low: a number"),
        (["hf=x", "seq_len="], "seq_len= has no value"),
        (["hf=x", "seed=1", "seed=2"], "seed is given twice"),
        (["hf=x", "fp64"], "is not KEY=VALUE"),
        (["dtype=fp64"], "hf=DIR is missing"),
    ],
)
def test_words_that_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_words(words)


@pytest.mark.parametrize(("spelt", "meant"), [("float64", "fp64"), ("float32", "fp32"), ("bfloat16", "bf16")])
def test_a_dtype_may_be_spelt_as_torch_spells_it(spelt: str, meant: str) -> None:
    assert parse_words(["hf=x", f"dtype={spelt}"]) == parse_words(["hf=x", f"dtype={meant}"])


def test_version_is_printed_without_a_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"headrace {importlib.metadata.version('headrace')}\n"


def test_make_hands_its_words_over_in_the_environment(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HEADRACE_OVERRIDES", "seq_len=5 dtype=fp32")
    assert main(["verify", f"hf={folder}", "--json"]) == 0
    values = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (values["seq_len"], values["dtype"], values["bound"]) == (5, "fp32", 5e-5)


def test_a_recipe_names_the_folder_that_it_starts_from(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(f"model:\n  init_from: {folder}\n")
    monkeypatch.setenv("HEADRACE_CONF", str(recipe))  # as make does
    assert main(["verify", "seq_len=5", "dtype=fp32", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["hf"] == str(folder)
    monkeypatch.delenv("HEADRACE_CONF")
    assert parse_words(with_recipe([f"conf={recipe}", "hf=other", "seed=3"])) == VerifyConfig(hf="other", seed=3)
    recipe.write_text("train:\n  steps: 3\n")
    assert main(["verify", f"conf={recipe}"]) == 2
    assert "model.init_from" in capsys.readouterr().err


def test_one_line_of_json_last_on_stdout(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [f"hf={folder}", "dtype=fp64", "seq_len=16", "batch=2", "memory=offload_host", "seed=3"]
    assert main(["verify", *words, "--json"]) == 0
    out = capsys.readouterr().out
    assert out.endswith("}\n")
    values = json.loads(out.splitlines()[-1])
    assert values["passed"] is True
    assert values["bit_equal_to_keep"] is True
    assert values["loss_rel_error"] <= 1e-11
    assert values["max_rel_error"] == max(values["params"].values()) <= 1e-11
    names = {name for name, _ in transformers.AutoModelForCausalLM.from_pretrained(folder).named_parameters()}
    assert values["params"].keys() == names


def test_a_broken_bound_is_exit_code_one(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from headrace.workers.model import dense

    monkeypatch.setattr(dense, "swiglu", lambda gate, up, **_: gate.relu() * up)
    assert main(["verify", f"hf={folder}", "seq_len=16", "--json"]) == 1
    values = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert values["passed"] is False
    assert values["max_rel_error"] > 1e-3
    assert len(values["failures"]) > 10
    assert main(["verify", f"hf={folder}", "seq_len=16"]) == 1
    assert "FAIL  model.embed_tokens.weight" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", ["fp64", "bf16"])
def test_table(folder: Path, capsys: pytest.CaptureFixture[str], dtype: str) -> None:
    assert main(["verify", f"hf={folder}", f"dtype={dtype}", "seq_len=32", "memory=offload_ssd"]) == 0
    out = capsys.readouterr().out
    assert "model.layers.1.self_attn.k_proj.bias" in out
    assert "bit-equal to memory=keep: True; moved: load/ssd" in out
    assert out.splitlines()[-1].startswith("PASS")
    assert ("whole gradient: " in out) is (dtype == "bf16")


def test_table_of_a_lossy_plan(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", f"hf={folder}", "seq_len=64", "memory=chunk_sparse", "chunk_size=16"]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[-1].startswith("LOSSY")
    assert "bit-equal to memory=chunk_sparse with every page in HBM: True; moved: load/host" in out


def test_bad_input_is_exit_code_two(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify"]) == 2
    assert "usage: headrace verify" in capsys.readouterr().out
    assert main(["verify", "--help"]) == 0
    capsys.readouterr()
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    weights = (folder / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    for words in (
        [f"hf={tmp_path / 'nowhere'}"],
        [f"hf={tmp_path}"],
        [f"hf={folder}", "--jsno"],
        [f"hf={folder}", "chunk_size=8"],
        [f"hf={folder}", "memory=auto"],
    ):
        assert main(["verify", *words]) == 2, words
        captured = capsys.readouterr()
        assert captured.err.startswith("headrace verify: "), words
        assert captured.out == ""


def test_bad_words_are_refused_without_torch() -> None:
    code = (
        "import sys\nfrom headrace.platform.cli.main import main\n"
        "assert main(['verify', 'hf=/nowhere/at/all']) == 2\nassert main(['verify', 'hf=x', 'sed=1']) == 2\n"
        "sys.exit(str([m for m in ('torch', 'transformers') if m in sys.modules] or ''))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd="/", capture_output=True, text=True, check=False, env=os.environ
    )
    assert "no such folder" in done.stderr
    assert "did you mean `seed`" in done.stderr
    assert "torch" not in done.stderr
