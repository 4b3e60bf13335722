"""Which node a rank is near, on machines that are not there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from headrace.storage.tiers.numa import cores_by_node
from headrace.workers.actors.numa_home import rank_node, visible_gpus
from headrace.workers.actors.rank import RankShell


def machine(folder: Path, gpus: dict[str, int | None], cpulists: dict[int, str]) -> dict[str, Path]:
    """/sys and /proc of a machine with GPUs, by PCI address their node (None: no such file), and cores by node."""
    sys, proc = folder / "sys", folder / "proc"
    for i, (address, node) in enumerate(gpus.items()):
        path = proc / "driver/nvidia/gpus" / address
        path.mkdir(parents=True)
        uuid = f"GPU-{'abcdefgh'[i]}{i}000000-1111-2222-3333-444444444444"
        (path / "information").write_text(
            f"Model: \t\t NVIDIA H100 80GB HBM3\nIRQ:   \t\t 18{i}\nGPU UUID: \t {uuid}\nBus Location: \t {address}\n"
        )
        if node is not None:
            device = sys / "bus/pci/devices" / address
            device.mkdir(parents=True)
            (device / "numa_node").write_text(f"{node}\n")
    for node, cpulist in cpulists.items():
        path = sys / f"devices/system/node/node{node}"
        path.mkdir(parents=True)
        (path / "cpulist").write_text(cpulist + "\n")
    return {"sys": sys, "proc": proc}


# The addresses of an HGX board; as text 0000:9b comes before 0000:ca and 0001:0b after both.
EIGHT = {
    "0000:ca:00.0": 1,
    "0000:1b:00.0": 0,
    "0000:43:00.0": 0,
    "0000:52:00.0": 0,
    "0000:61:00.0": 0,
    "0000:9d:00.0": 1,
    "0000:d1:00.0": 1,
    "0001:0b:00.0": 1,
}


def test_every_rank_of_eight_gpus_is_near_its_own(tmp_path: Path) -> None:
    where = machine(tmp_path, EIGHT, {0: "0-55", 1: "56-111"})
    # One process sees all of them, as without Ray.
    assert [rank_node("cuda", i, environ={}, **where) for i in range(8)] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert rank_node("cuda", 8, environ={}, **where) is None
    # Each process sees one, as under Ray, and takes it whatever its rank is.
    found = [rank_node("cuda", i, environ={"CUDA_VISIBLE_DEVICES": str(7 - i)}, **where) for i in range(8)]
    assert found == [1, 1, 1, 1, 0, 0, 0, 0]


def test_gpus_are_counted_in_the_order_of_the_bus(tmp_path: Path) -> None:
    proc = machine(tmp_path, EIGHT, {})["proc"]
    assert visible_gpus(proc=proc, environ={}) == sorted(
        EIGHT, key=lambda address: int(address.replace(":", "")[:8], 16)
    )
    assert visible_gpus(proc=proc, environ={"CUDA_VISIBLE_DEVICES": " 5, 0"}) == ["0000:ca:00.0", "0000:1b:00.0"]
    for hidden in ("", "-1", "NoDevFiles", "8"):
        assert visible_gpus(proc=proc, environ={"CUDA_VISIBLE_DEVICES": hidden}) == []
    assert visible_gpus(proc=proc, environ={"CUDA_VISIBLE_DEVICES": "1,9,2"}) == ["0000:43:00.0"], "as CUDA does"
    assert visible_gpus(proc=tmp_path / "no driver", environ={}) == []


def test_gpus_by_their_uuid(tmp_path: Path) -> None:
    where = machine(tmp_path, {"0000:3b:00.0": 0, "0000:af:00.0": 1}, {})
    whole = "GPU-b1000000-1111-2222-3333-444444444444"
    assert rank_node("cuda", 0, environ={"CUDA_VISIBLE_DEVICES": whole}, **where) == 1
    assert rank_node("cuda", 1, environ={"CUDA_VISIBLE_DEVICES": "GPU-b1,GPU-a0"}, **where) == 0
    assert rank_node("cuda", 0, environ={"CUDA_VISIBLE_DEVICES": "GPU-"}, **where) is None, "two begin so"
    assert rank_node("cuda", 0, environ={"CUDA_VISIBLE_DEVICES": "MIG-b1"}, **where) is None


def test_a_machine_that_does_not_say(tmp_path: Path) -> None:
    where = machine(tmp_path, {"0000:3b:00.0": -1, "0000:af:00.0": None}, {})
    assert [rank_node("cuda", i, environ={}, **where) for i in range(2)] == [None, None]
    assert rank_node("cpu", 0, cores=frozenset({0}), **where) is None


def test_a_cpu_rank_is_near_its_cores(tmp_path: Path) -> None:
    where = machine(tmp_path, {"0000:3b:00.0": 1}, {0: "0-3", 1: "4-7", 2: ""})
    assert rank_node("cpu", 0, cores=frozenset({5, 6}), **where) == 1
    assert rank_node("cpu", 0, cores=frozenset({0, 1, 2, 3}), **where) == 0
    assert rank_node("cpu", 0, cores=frozenset({3, 4}), **where) is None


def test_the_shell_tells_its_own() -> None:
    home = RankShell(3).home()
    assert (home.rank, home.process.pid) == (3, os.getpid())
    holding = [node for node, cores in cores_by_node().items() if os.sched_getaffinity(0) <= cores]
    assert home.numa_node == (holding[0] if holding else None)


def test_a_rank_on_a_gpu_asks_for_the_gpus_node(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, int]] = []
    monkeypatch.setattr("headrace.workers.actors.rank.rank_node", lambda *words: asked.append(words) or 1)
    assert RankShell(5).home("cuda", 1).numa_node == 1
    assert asked == [("cuda", 1)]
