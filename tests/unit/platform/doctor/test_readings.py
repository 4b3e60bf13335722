"""What the child processes read here, without a GPU; the kinds of rows are those that the checks look for."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from headrace.platform.children import PartResult, run_part
from headrace.platform.doctor import rates, readings
from headrace.platform.doctor.readings import TorchReading, disk_rows, gds_rows, torch_rows
from headrace.storage.core.errors import InputError
from headrace.workers.actors import net


@pytest.mark.slow
def test_torch_says_what_it_is() -> None:
    part = PartResult(tuple(json.loads(json.dumps(list(torch_rows())))), None, 1.0)
    row = part.find(what="torch")
    assert row is not None
    reading = TorchReading.from_row(row)
    assert reading.version == torch.__version__.split("+")[0]
    assert reading.cuda == torch.version.cuda
    assert len(reading.gpus) == (torch.cuda.device_count() if torch.cuda.is_available() else 0)
    for what, key in (("host_copy", "gbps"), ("gemm", "tflops"), ("collective", "s")):
        measured = part.find(what=what)
        assert measured is not None
        assert measured[key] > 0, measured


def test_the_collective_takes_the_interface_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that routes to this machine, or the one that is named; a wrong name is refused."""
    for name in net.INTERFACES:
        monkeypatch.setenv(name, "before")  # so that it is put back
        monkeypatch.delenv(name)
    with pytest.raises(InputError, match=r"cluster\.interface=eth99: .*choose one of .*\blo\b"):
        readings._collective(torch, "gloo", "eth99")
    monkeypatch.setattr(net, "own_address", lambda: "127.0.0.1")
    assert readings._collective(torch, "gloo", None)["interface"] == os.environ["GLOO_SOCKET_IFNAME"] == "lo"


@pytest.mark.slow
def test_dali_works() -> None:
    part = run_part("headrace.platform.doctor.readings", ["dali"], limit_s=600)
    assert part.failure is None
    assert [row["what"] for row in part.rows] == ["dali"]


def test_a_row_becomes_a_reading_again() -> None:
    gpu = {"name": "NVIDIA H200", "capability": [9, 0], "total_gib": 139.8, "free_gib": 139.0}
    row = {
        "what": "torch",
        "version": "2.13.0",
        "cuda": "13.0",
        "cuda_error": "",
        "driver_cuda": [13, 0],
        "gpus": [gpu],
    }
    reading = TorchReading.from_row(json.loads(json.dumps({**row, "nccl": "2.28.9", "peer_access": None})))
    assert reading.driver_cuda == (13, 0)
    assert reading.gpus[0].capability == (9, 0)
    assert reading.gpus[0].name == "NVIDIA H200"


def test_a_cuda_build_that_cannot_reach_its_gpu_says_why() -> None:
    def refuse() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old\nmore words")

    fake = SimpleNamespace(
        __version__="2.13.0+cu130",
        version=SimpleNamespace(cuda="13.0"),
        cuda=SimpleNamespace(init=refuse),
        distributed=SimpleNamespace(is_available=lambda: False),
    )
    row = readings._torch(fake)
    assert row["cuda_error"] == "The NVIDIA driver on your system is too old"
    assert row["gpus"] == []
    assert row["version"] == "2.13.0"


def test_one_failure_does_not_cost_the_next_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> dict[str, float]:
        raise OSError("no interface")

    monkeypatch.setattr(readings, "_collective", refuse)
    monkeypatch.setattr(rates, "host_copy_gbps", lambda: 5.0)
    rows = {row["what"]: row for row in torch_rows()}
    assert rows["collective"] == {"what": "collective", "error": "OSError: no interface"}
    assert rows["host_copy"]["gbps"] == 5.0
    assert rows["gemm"]["tflops"] > 0


def test_host_copy_counts_each_byte_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(100))
    monkeypatch.setattr(rates, "time", SimpleNamespace(perf_counter=lambda: float(next(clock))))
    assert rates.host_copy_gbps(num_bytes=10**6, num_calls=3) == 10**6 / 1.0 / 1e9


def test_the_drive_is_measured_and_left_clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readings, "GIB", 2**27)
    (row,) = disk_rows(str(tmp_path))
    assert row["what"] == "disk"
    assert row["bytes"] == 2**25
    assert min(row["write_gbps"], row["read_gbps"]) > 0
    assert list(tmp_path.iterdir()) == []


def test_the_engine_of_a_run_is_named(tmp_path: Path) -> None:
    rows = {row["what"]: row for row in gds_rows(str(tmp_path))}
    assert rows["engine"]["got"] == ("posix" if not torch.cuda.is_available() else rows["engine"]["got"])
    assert rows["engine"]["real"] is (rows["engine"]["got"] == "gds")
    assert set(rows["kvikio"]) == {"what", "version", "error"}
    assert list(tmp_path.iterdir()) == []
