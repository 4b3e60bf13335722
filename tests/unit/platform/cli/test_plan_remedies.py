"""What `headrace plan` advises is typed in, and the plan is asked for again."""

from __future__ import annotations

from pathlib import Path

import pytest

from headrace.helpers.tiers import has_id
from headrace.platform.cli import plan
from headrace.storage.core.errors import ErrorId, InputError

# Stated, so that nothing is measured and no machine is too small or too large.
MACHINE = (
    "hardware.fp32_tflops=0.1",
    "hardware.d2h_gbps=5",
    "hardware.h2d_gbps=5",
    "hardware.ssd_write_gbps=1",
    "hardware.ssd_read_gbps=1",
)
CPU = (*MACHINE, "hardware.host_gib=24", "hardware.ssd_gib=100")
SMALL = (*MACHINE, "hardware.host_gib=2.6", "hardware.ssd_gib=0.01", "model=tiny")
WORDS = {
    "device": (*CPU, "model=tiny", "memory=keep", "tiers.device.budget_gib=0.001"),
    "device, auto": (*CPU, "model=llama_5m", "tiers.device.budget_gib=0.02", "tiers.ssd.budget_gib=0"),
    "host": (*CPU, "model=tiny", "memory=offload_host", "tiers.host.budget_gib=0.0001"),
    "ssd": (*CPU, "model=tiny", "memory=offload_ssd", "tiers.ssd.budget_gib=0.0001"),
    "a full drive": (*CPU, "hardware.ssd_gib=0", "model=tiny", "memory=offload_ssd"),
    "the node's memory": (
        *MACHINE, "hardware.host_gib=24", "hardware.ssd_gib=8", "model=qwen2_5_0_5b", "data.seq_len=524288",
    ),
    "the node's memory, kept": (*CPU, "model=qwen2_5_0_5b", "data.seq_len=16384", "memory=keep"),
    "1 billion parameters": (*CPU, "model=llama3_2_1b", "data.seq_len=4096"),
    "8 billion parameters": (*CPU, "model=llama3_8b", "data.seq_len=4096"),
    "a small node": (*SMALL, "data.seq_len=65536"),
    "a small node, two ranks": (*SMALL, "hardware.host_gib=3.15", "data.seq_len=65536", "cluster.num_workers=2"),
    "without Ray": (*SMALL, "hardware.host_gib=1.45", "data.seq_len=65536", "cluster=inline"),
    "stated degrees": (*SMALL, "data.seq_len=65536", "parallel.data=1", "parallel.fsdp=1"),
    "gpu": ("experiment=qwen2_5_7b_32k_1xh200", "tiers.device.budget_gib=120"),
    "gpu, long": ("experiment=qwen2_5_7b_256k_1xh200", "hardware=h100_80g"),
    "gpu, two axes": (
        "model=llama3_70b", "train=bf16", "hardware=h100_80g", "data.seq_len=2097152", "parallel.ulysses=4",
        "cluster.gpus_per_node=4",
    ),
    "gpu, more than it has": ("model=llama3_8b", "train=bf16", "hardware=h200", "memory=keep", "data.seq_len=16384"),
    "gpu, by chunk": ("model=qwen2_5_7b", "train=bf16", "hardware=h200", "memory=chunk", "data.seq_len=1048576"),
    "70 billion on 8 gpus": ("model=llama3_70b", "train=bf16", "hardware=h100_80g", "cluster.gpus_per_node=8"),
}  # fmt: skip


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def proposals(words: tuple[str, ...]) -> list[str]:
    with pytest.raises(InputError) as caught:
        plan.run(words)
    _, _, text = str(caught.value).partition("any one of these would make it fit:\n")
    return [line.strip() for line in text.splitlines() if "=" in line]


@pytest.mark.parametrize("name", WORDS)
def test_every_advice_works_when_it_is_followed(name: str) -> None:
    found = proposals(WORDS[name])
    assert found, name
    for text in found:
        assert plan.run([*WORDS[name], *text.split()]) == 0, text


def test_a_model_that_no_change_makes_fit_is_not_planned() -> None:
    """70 billion parameters, their gradients and AdamW's state are 1.1 TB."""
    with pytest.raises(InputError) as caught:
        plan.run([*CPU, "model=llama3_70b"])
    assert "memory: 11" in str(caught.value)
    assert "(22.351 GiB" not in str(caught.value)


@pytest.mark.parametrize("what", ["a file", "below a file", "not writable"])
def test_a_folder_that_cannot_be_used_is_named_with_its_key(what: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    file = tmp_path / "file"
    path = {"a file": file, "below a file": file / "x", "not writable": Path("/proc/self/x")}[what]
    with pytest.raises(InputError, check=has_id(ErrorId.ssd_path_unusable)) as caught:
        plan.run([*CPU, "model=tiny", f"tiers.ssd.path={path}"])
    assert f"tiers.ssd.path={path}" in str(caught.value)
    assert plan.run([*CPU, "model=tiny", f"tiers.ssd.path={path}", "tiers.ssd.budget_gib=0"]) == 0


def test_a_full_drive_names_the_key_of_its_folder(tmp_path: Path) -> None:
    words = [*CPU, "hardware.ssd_gib=0", "model=tiny", f"tiers.ssd.path={tmp_path}"]
    for more in ("memory=offload_ssd", "tiers.ssd.budget_gib=1"):
        with pytest.raises(InputError, match=r"tiers\.ssd\.path"):
            plan.run([*words, more])


def test_memory_that_grows_needs_a_stated_budget() -> None:
    with pytest.raises(InputError, match=r"set tiers\.host\.budget_gib too"):
        plan.run(["model=tiny", "tiers.host.memory_grows=true"])
    stated = [*MACHINE, "hardware.ssd_gib=1", "model=tiny", "tiers.host.memory_grows=true"]
    assert plan.run([*stated, "memory=offload_host", "tiers.host.budget_gib=5000"]) == 0
