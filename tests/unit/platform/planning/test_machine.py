from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from headrace.platform.planning import machine as module
from headrace.platform.planning.hardware import DeviceClass, Evidence, HardwareProfile
from headrace.platform.planning.machine import fill_in, mount_of
from headrace.workers.telemetry.rate_book import RateBook

CPU = HardwareProfile(name="cpu", device_class=DeviceClass.cpu, evidence=Evidence.measured)


@pytest.fixture
def book(tmp_path_factory: pytest.TempPathFactory) -> RateBook:
    return RateBook(tmp_path_factory.mktemp("book") / "rates.json")


def test_what_is_open_is_measured(tmp_path: Path, book: RateBook) -> None:
    found = fill_in(CPU, [tmp_path / "not" / "there" / "yet"], book=book)
    assert found.ssd_gib == pytest.approx(shutil.disk_usage(tmp_path).free / 2**30, rel=0.05)
    assert 0.01 < found.host_gib < 1e5
    assert 1e-4 < found.fp32_tflops < 100
    assert 0.05 < found.d2h_gbps == found.h2d_gbps == found.memory_gbps / 2 < 1000
    assert (found.ssd_write_gbps is None) == (found.ssd_read_gbps is None)
    assert found.device_memory_gib is None
    assert not list(tmp_path.iterdir())


def test_what_is_stated_stands(tmp_path: Path, book: RateBook) -> None:
    stated = replace(CPU, host_gib=1.0, ssd_gib=2.0, fp32_tflops=3.0, d2h_gbps=4.0, h2d_gbps=5.0)
    stated = replace(stated, ssd_write_gbps=6.0, ssd_read_gbps=7.0, memory_gbps=8.0)
    assert fill_in(stated, [tmp_path], book=book) == stated


def test_a_gpu_s_own_rates_are_not_this_cpu_s(tmp_path: Path, book: RateBook) -> None:
    found = fill_in(HardwareProfile(name="h200", fp32_tflops=None, d2h_gbps=None), [tmp_path], book=book)
    assert (found.fp32_tflops, found.d2h_gbps) == (None, None)
    assert found.host_gib is not None


def test_a_second_plan_counts_with_the_same_rates(tmp_path: Path, book: RateBook, monkeypatch) -> None:
    first = fill_in(CPU, [tmp_path], book=book)
    assert "measured 20" in book.note()

    def again() -> float:
        raise AssertionError("measured again")

    for name in ("gemm_tflops", "copy_gbps"):
        monkeypatch.setattr(module, name, again)
    found = fill_in(CPU, [tmp_path], book=RateBook(book.path))
    assert (found.fp32_tflops, found.d2h_gbps) == (first.fp32_tflops, first.d2h_gbps)
    if first.ssd_write_gbps is not None:
        assert (found.ssd_write_gbps, found.ssd_read_gbps) == (first.ssd_write_gbps, first.ssd_read_gbps)


def test_drives_are_told_apart_by_where_they_are_mounted(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    mount = mount_of(tmp_path / "a")
    assert mount == mount_of(tmp_path)
    assert mount.is_mount()
