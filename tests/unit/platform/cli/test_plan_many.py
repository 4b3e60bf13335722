"""`headrace plan` about many plans: a sweep over lengths, the longest row, two plans side by side."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from headrace.helpers.planning import FOUR_KEYS
from headrace.platform.cli.main import main
from headrace.platform.cli.plan_many import read_lengths
from headrace.platform.planning import many
from headrace.platform.planning.hardware import DeviceClass, HardwareProfile
from headrace.platform.planning.request import PlanRequest
from headrace.platform.planning.solve import find_plan
from headrace.storage.core.errors import InputError
from headrace.workers.memory.config import MemoryPreset
from headrace.workers.memory.plan import Sweep

GPU = ("model=tiny", "hardware=h100_80g", "train=bf16", "data.max_bytes=null")
SMALL = (*GPU, "tiers.device.budget_gib=0.062", "tiers.host.budget_gib=0.01", "tiers.ssd.budget_gib=0")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def answer_to(words: list[str], capsys: pytest.CaptureFixture[str]) -> dict:
    assert main(["plan", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_a_sweep_is_a_table_a_picture_and_the_plans_of_its_lengths(capsys) -> None:
    assert main(["plan", *SMALL, "sweep=data.seq_len:1k..20000"]) == 0
    text = capsys.readouterr().out
    lines = text.splitlines()
    assert max(map(len, lines)) <= 120
    rows = [line.split()[0] for line in lines if line[:1].isdigit()]
    assert rows == ["1024", "2048", "4096", "8192", "16384", "20000"]
    assert Path("plan_sweep.png").read_bytes().startswith(b"\x89PNG")
    found = answer_to([*SMALL, "sweep=data.seq_len:1k..20000", "picture=other.png"], capsys)
    assert Path("other.png").exists()
    fits = [each["fits"] for each in found["sweep"]]
    assert fits == sorted(fits, reverse=True)
    assert set(fits) == {True, False}
    alone = answer_to([*SMALL, "data.seq_len=4096"], capsys)
    assert found["sweep"][2]["predicted"] == alone["predicted"]
    assert found["sweep"][2]["plan"] == alone["plan"]
    refused = found["sweep"][-1]
    assert "device" in refused["binding"]
    assert refused["predicted"]["gpu_peak_gib"] > 0.062


@pytest.mark.parametrize(
    ("text", "lengths"),
    [
        ("32k..256K", [32768, 65536, 131072, 262144]),
        ("3..4m", [3 << n for n in range(21)] + [4 << 20]),
        ("500..500", [500]),
    ],
)
def test_lengths_double_up_to_the_last(text: str, lengths: list[int]) -> None:
    assert read_lengths(f"data.seq_len:{text}") == lengths


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["sweep=data.seq_len:4m..32k"], "the last not below it"),
        (["sweep=data.seq_len:0..32k"], "the first length is at least 1"),
        (["sweep=data.seq_len:1..1000000m"], "at most 268435456"),
        (["sweep=data.seq_len:1g..2g"], "'1g' is no length"),
        (["sweep=data.seq_len:32k"], "write sweep=data.seq_len:FIRST..LAST"),
        (["sweep=train.batch_size:1..4"], "write sweep=data.seq_len:FIRST..LAST"),
        (["sweep=data.seq_len:1k..2k", "picture=sweep.svg"], "picture=sweep.svg: the picture is a PNG"),
        (["sweep=data.seq_len:1k..2k", "picture=no/such/a.png"], "picture=no/such/a.png: cannot be written"),
        (["sweep=data.seq_len:1k..2k", "--max-len"], "sweep and --max-len: ask for one of them"),
        (["sweep=data.seq_len:1k..2k", "trace=a.json"], "trace=a.json: of one plan"),
        (["sweep=data.seq_len:1k..2k", "data.buckets=128,256"], "set data.buckets=[]"),
        (
            ["sweep=data.seq_len:1k..1027", "cluster.gpus_per_node=4", "parallel.ulysses=4"],
            "data.seq_len=1027: parallel.ulysses x parallel.ring=4 cut it evenly; use 1024 or 1028",
        ),
        (["sweep=data.seq_len:1k..2k", "cluster.gpus_per_node=2", "parallel.pipeline=2", "train.micro_batches=2"],
         "sweep: parallel.pipeline=2 has a plan for each rank"),
        (["picture=a.png"], "picture=a.png: goes with sweep only"),
        (["unit=8"], "unit=8: goes with --max-len only"),
        (["--max-len", "unit=0"], "unit=0: at least one token"),
        (["--max-len", "unit=1000000000"], "take a smaller unit"),
        (["--max-len", "tiers.device.budget_gib=0.001"], "memory=auto does not fit at data.seq_len=1024"),
        (["compare=auto"], "two different presets or configurations"),
        (["compare=auto,auto"], "two different presets or configurations"),
        (["compare=auto,no_such"], "conf=no_such: there is no such configuration"),
        (["compare=keep,recompute", "tiers.device.budget_gib=0.001"], "memory=keep does not fit"),
    ],
)  # fmt: skip
def test_bad_questions_are_refused_in_words(words: list[str], said: str, capsys) -> None:
    assert main(["plan", *GPU, "data.seq_len=256", *words]) == 2
    assert said in capsys.readouterr().err


def test_the_longest_row_has_a_plan_and_one_unit_more_has_none(capsys) -> None:
    found = answer_to([*SMALL, "--max-len", "unit=256"], capsys)
    length = found["max_seq_len"]
    assert length % found["unit"] == 0
    assert found["is_bounded"]
    assert main(["plan", *SMALL, f"data.seq_len={length}"]) == 0
    assert main(["plan", *SMALL, f"data.seq_len={length + 256}"]) == 2
    capsys.readouterr()
    assert main(["plan", *SMALL, "--max-len", "unit=256"]) == 0
    assert capsys.readouterr().out.startswith(f"longest row that fits: {length} tokens, in units of 256\n\nplan auto")


def test_a_refusal_of_the_longest_row_is_an_answer_for_programs_too(capsys) -> None:
    assert main(["plan", *GPU, "tiers.device.budget_gib=0.001", "--max-len", "--json"]) == 2
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["fits"] is False


def test_ranks_that_share_a_row_raise_the_unit(capsys) -> None:
    shared = ["cluster.gpus_per_node=4", "parallel.ring=4", "memory=offload_host"]
    found = answer_to([*SMALL, *shared, "--max-len", "unit=6"], capsys)
    assert found["unit"] == 12


@pytest.mark.parametrize("preset", ["keep", "offload_host", "memo", "chunk_host", "chunk_auto", "auto"])
@pytest.mark.parametrize("mib", [18, 40])
def test_the_search_finds_what_every_length_says(preset: str, mib: int) -> None:
    profile = HardwareProfile(name="cpu", device_class=DeviceClass.cpu, fp32_tflops=0.1, d2h_gbps=5, h2d_gbps=5)
    request = PlanRequest(
        model=FOUR_KEYS,
        seq_len=7,
        profile=profile,
        preset=MemoryPreset(preset),
        device_budget_bytes=mib << 20,
        host_budget_bytes=6 << 20,
        ssd_budget_bytes=0,
        chunk_size=128 if preset.startswith("chunk") or preset == "auto" else None,
    )
    fitting = [number for number in range(1, 60) if many.has_plan(replace(request, seq_len=128 * number))]
    assert fitting == list(range(1, len(fitting) + 1))
    if not fitting:
        with pytest.raises(InputError, match=r"does not fit at data\.seq_len=128"):
            many.longest(request, 128)
        return
    found = many.longest(request, 128)
    assert found.request.seq_len == 128 * fitting[-1] < 128 * 59
    assert find_plan(replace(request, seq_len=found.request.seq_len + 128)) is None


def test_auto_goes_as_far_as_the_sweep_that_goes_further() -> None:
    """Keys of one head, and their gradients, are smaller than the input of a block."""
    cpu = HardwareProfile(name="cpu", device_class=DeviceClass.cpu)
    request = PlanRequest(
        model=replace(FOUR_KEYS, num_kv_heads=1, num_layers=12),
        seq_len=7,
        profile=cpu,
        device_budget_bytes=200 << 20,
        host_budget_bytes=0,
        ssd_budget_bytes=0,
    )
    by_chunk = many.longest(replace(request, preset=MemoryPreset.chunk_auto), 256).request.seq_len
    by_layer = many.longest(replace(request, sweep=Sweep.by_layer), 256).request.seq_len
    assert by_layer < by_chunk == many.longest(request, 256).request.seq_len


def test_without_limits_every_length_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(many, "MOST_TOKENS", 1 << 14)
    cpu = HardwareProfile(name="cpu", device_class=DeviceClass.cpu)
    request = PlanRequest(model=FOUR_KEYS, seq_len=7, profile=cpu, preset=MemoryPreset.keep)
    found = many.longest(request)
    assert (found.request.seq_len, found.is_bounded) == (1 << 14, False)


def test_two_plans_side_by_side(capsys) -> None:
    words = [*SMALL, "data.seq_len=4096"]
    assert main(["plan", *words, "compare=keep,auto"]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 120
    assert "fits                no: device                  yes" in text
    assert "  memory.preset: keep | auto" in text
    found = answer_to([*words, "compare=recompute,offload_host"], capsys)
    first, second = (found["plans"][name] for name in ("recompute", "offload_host"))
    assert second == {"seq_len": 4096, **answer_to([*words, "memory=offload_host"], capsys), "ssd_wear": None}
    assert first["predicted"]["host_peak_gib"] == 0 < second["predicted"]["host_peak_gib"]
    assert found["differs"] == {"memory.preset": ["recompute", "offload_host"]}


def test_two_configurations_side_by_side(capsys) -> None:
    recipe = Path("mine.yaml")
    recipe.write_text(
        "defaults:\n  - override /model: tiny\n  - override /hardware: h100_80g\ndata: {max_bytes: null}\n"
    )
    found = answer_to(["compare=mine.yaml,qwen2_5_7b_32k_1xh200"], capsys)
    assert set(found["plans"]) == {"mine.yaml", "qwen2_5_7b_32k_1xh200"}
    assert found["differs"]["hardware.name"] == ["h100_80g", "h200"]
