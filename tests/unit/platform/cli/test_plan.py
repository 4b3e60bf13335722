from __future__ import annotations

import json
import subprocess
import sys

import pytest

from headrace.platform.cli import plan
from headrace.platform.cli.main import main
from headrace.storage.core.errors import InputError
from headrace.workers.memory.plan import MemoryPlan

TINY = ("model=tiny", "data.seq_len=256")


def test_the_table(capsys) -> None:
    assert plan.run([*TINY, "memory=offload_host"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("plan offload_host: tiny, 256 tokens x 1 x 1 micro-batches per rank, fp32, on cpu")
    assert "step: " in text


def test_json_is_the_last_line(capsys) -> None:
    assert main(["plan", *TINY, "--json", "tiers.device.budget_gib=0.01"]) == 0
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    solved = MemoryPlan.from_dict(answer["plan"])
    assert len(solved.layers) == 2
    assert answer["tiers"]["device"]["wanted_bytes"] <= answer["tiers"]["device"]["budget_bytes"]


def test_nothing_fits(capsys) -> None:
    assert main(["plan", *TINY, "memory=keep", "tiers.device.budget_gib=0.001"]) == 2
    said = capsys.readouterr().err
    assert "memory=keep does not fit" in said
    assert "any one of these would make it fit:" in said


def test_what_does_not_fit_is_an_answer_for_programs_too(capsys) -> None:
    assert main(["plan", *TINY, "memory=keep", "tiers.device.budget_gib=0.001", "--json"]) == 2
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (answer["fits"], answer["plan"], answer["binding"]) == (False, None, ["device"])
    assert answer["predicted"]["gpu_peak_gib"] > 0.001
    assert answer["predicted"]["step_s"] is None
    assert answer["changes"]


def test_long_context(capsys) -> None:
    # Weights, gradients and AdamW's state of 7.6 B parameters are 16 bytes each: 114 of one H200's 137 GiB.
    words = ["experiment=qwen2_5_7b_256k_1xh200"]
    assert main(["plan", *words]) == 0
    out = capsys.readouterr()
    assert "beyond model.max_position_embeddings" in out.err
    assert "chunks      64 of 4096 tokens" in out.out
    assert main(["plan", *words, "hardware=h100_80g"]) == 2
    said = capsys.readouterr().err
    assert "are weights, gradients, their reduction, optimizer state" in said
    assert "cluster.gpus_per_node=4" in said
    assert main(["plan", *words, "cluster.gpus_per_node=8", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert len(answer["plan"]["layers"]) == 28
    assert answer["predicted"]["gpu_peak_gib"] <= 139.8
    # 6 N D and 3/5 of 12 L h s^2: between 100 and 600 s at half the datasheet's rate.
    assert 100 < answer["predicted"]["step_s"] < 600


def test_mistakes_are_explained() -> None:
    with pytest.raises(InputError, match="did you mean `--json`"):
        plan.run(["--jsn"])
    with pytest.raises(InputError, match=r"data\.seq_len"):
        plan.run(["data.seq_ln=4"])
    with pytest.raises(InputError, match="prepared"):
        plan.run([*TINY, "data.prepared=/no/such/folder"])


def test_help(capsys) -> None:
    assert main(["plan", "--help"]) == 0
    assert "usage: headrace plan" in capsys.readouterr().out


def test_without_torch_or_ray_in_two_seconds() -> None:
    code = (
        "import resource, sys\nfrom headrace.platform.cli.main import main\n"
        f"assert main(['plan', *{TINY}]) == 0\nassert not {{'torch', 'ray', 'mlflow'}} & set(sys.modules)\n"
        "usage = resource.getrusage(resource.RUSAGE_SELF)\nassert usage.ru_utime + usage.ru_stime < 2.0"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
