"""`headrace plan` with a timeline, and of a pipeline."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from headrace.platform.cli.main import main
from headrace.workers.memory.plan import MemoryPlan

GPU = ("model=tiny", "hardware=h100_80g", "train=bf16", "data.seq_len=256", "data.max_bytes=null")
STAGES = ("cluster.gpus_per_node=2", "parallel.pipeline=2", "train.micro_batches=4", "memory=offload_host")


def test_a_picture_and_a_trace(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    picture, trace = tmp_path / "step.png", tmp_path / "step.json"
    monkeypatch.setenv("HEADRACE_OVERRIDES", f"timeline={picture}")  # as make passes it
    words = [*GPU, "data.seq_len=4096", "memory=offload_host"]  # long enough that compute hides the copies
    assert main(["plan", *words, f"trace={trace}", "--json"]) == 0
    predicted = json.loads(capsys.readouterr().out.splitlines()[-1])["predicted"]["step_s"]
    assert picture.read_bytes().startswith(b"\x89PNG")
    events = json.loads(trace.read_text())["traceEvents"]
    lanes = {row["tid"]: row["args"]["name"] for row in events if row["name"] == "thread_name"}
    done = [row for row in events if row["ph"] == "X"]
    assert {"compute", "h2d", "d2h"} >= {lanes[row["tid"]] for row in done} >= {"compute", "d2h"}
    assert max(row["ts"] + row["dur"] for row in done) == pytest.approx(1e6 * predicted, rel=0.02)


def test_the_plan_of_a_pipeline(tmp_path: Path, capsys) -> None:
    assert main(["plan", *GPU, *STAGES, f"trace={tmp_path / 'step.json'}"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("pipeline 1f1b: tiny, 256 tokens x 1 x 4 micro-batches, on 2 x h100_80g")
    assert max(map(len, text.splitlines())) <= 120
    events = json.loads((tmp_path / "step.json").read_text())["traceEvents"]
    assert [row["args"]["name"] for row in events if row["name"] == "process_name"] == ["stage 0", "stage 1"]
    assert main(["plan", *GPU, *STAGES, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [len(MemoryPlan.from_dict(stage["plan"]).layers) for stage in answer["stages"]] == [1, 1]
    step_s, rate = (answer["predicted"][name] for name in ("step_s", "tokens_per_s_per_gpu"))
    assert rate == pytest.approx(4 * 256 / 2 / step_s)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["timeline=step.jpg"], "timeline=step.jpg: the picture is a PNG"),
        (["trace=no/such/folder/step.json"], "trace=no/such/folder/step.json: cannot be written"),
        (["timeline="], "timeline= has no value"),
        ([*STAGES, "hardware.node_network_gbps=null"], "hardware.node_network_gbps, which is not known"),
        (
            [*STAGES, "tiers.device.budget_gib=0.001"],
            "rank 0 of the pipeline (1 blocks): memory=offload_host does not fit",
        ),
    ],
)
def test_what_cannot_be_drawn_is_refused(words: list[str], said: str, capsys, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["plan", *GPU, *words]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.soak
@pytest.mark.parametrize(
    "words",
    [
        "model=llama3_405b data.seq_len=262144 cluster.num_nodes=64 parallel.tensor=8 parallel.ring=8 "
        "parallel.pipeline=8 train.micro_batches=16",
        "model=llama3_8b data.seq_len=15500000 cluster.num_nodes=4 parallel.ulysses=32 train.deterministic=false",
    ],
)
def test_large_runs_are_drawn_in_ten_seconds(words: str, tmp_path: Path) -> None:
    begin_s = time.process_time()
    every = ("hardware=h100_80g", "train=bf16", "data.max_bytes=null", "cluster=node8")
    assert main(["plan", *words.split(), *every, f"timeline={tmp_path / 'step.png'}"]) == 0
    assert time.process_time() - begin_s < 10
