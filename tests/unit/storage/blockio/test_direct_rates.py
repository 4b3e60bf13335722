"""The faster way is taken, with its numbers; a slow O_DIRECT and a slow page cache are played by a delay."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from headrace.helpers.tiers import open_files
from headrace.storage.blockio import direct_rates
from headrace.storage.blockio.direct_file import DirectFile, probe_direct
from headrace.storage.blockio.direct_rates import MIN_BYTES, DirectRates, WayRates, measure_direct
from headrace.storage.blockio.page_cache import resident_bytes


@pytest.mark.parametrize(
    ("direct", "buffered", "taken"),
    [
        ((1.9, 2.4), (0.6, 1.1), True),  # NVMe
        ((0.5, 0.4), (1.6, 1.5), False),  # Lustre
        ((1.0, 1.0), (1.4, 1.4), True),  # not clearly
        ((1.0, 1.0), (1.6, 1.6), False),
        ((1.0, 0.5), (0.9, 2.5), False),  # slower to write, and far faster to read
    ],
)
def test_direct_unless_the_page_cache_is_clearly_faster(
    direct: tuple[float, float], buffered: tuple[float, float], taken: bool
) -> None:
    rates = DirectRates(WayRates(*direct), WayRates(*buffered))
    assert rates.take_direct is taken
    assert rates.why == (
        f"O_DIRECT {direct[0]:.2f} GB/s write, {direct[1]:.2f} read; "
        f"through the page cache {buffered[0]:.2f} write with fsync, {buffered[1]:.2f} read"
    )


def test_reads_from_memory_do_not_count() -> None:
    rates = DirectRates(WayRates(1.0, 1.0), WayRates(1.0, 50.0), reads_compared=False)
    assert rates.take_direct
    assert "its pages stay" in rates.why
    rates.reads_compared = True
    rates.direct.read_gbps = 0.5
    assert not rates.take_direct


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "slab"
    if not probe_direct(tmp_path).direct:
        pytest.skip("no O_DIRECT here")
    with path.open("wb") as opened:
        os.posix_fallocate(opened.fileno(), 0, MIN_BYTES)
    return path


@pytest.mark.parametrize("slow", [True, False])
def test_the_slow_way_is_not_taken(file: Path, monkeypatch: pytest.MonkeyPatch, slow: bool) -> None:
    ticks = [0.0]
    monkeypatch.setattr(direct_rates, "time", SimpleNamespace(perf_counter=lambda: ticks.append(0.01) or sum(ticks)))
    for name in ("read_some", "write_some"):
        real = getattr(DirectFile, name)

        def late(self: DirectFile, view: memoryview, offset_bytes: int, real: object = real) -> int:
            ticks.append(0.7 if self.direct is slow else 0.0)
            return real(self, view, offset_bytes)

        monkeypatch.setattr(DirectFile, name, late)
    rates = measure_direct(str(file), MIN_BYTES)
    assert rates.take_direct is not slow, rates.why
    assert min(rates.direct.write_gbps, rates.direct.read_gbps, rates.buffered.write_gbps) > 0


def test_the_measurement_leaves_no_page_and_no_descriptor(file: Path) -> None:
    measure_direct(str(file), MIN_BYTES)
    assert resident_bytes(file, 0, MIN_BYTES) == 0
    assert file.stat().st_size == MIN_BYTES
    assert open_files(file.parent) == []


def test_it_ends_at_64_mib_or_when_the_time_is_over(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.truncate(file, 4 * MIN_BYTES)
    ends: list[int] = []
    real = DirectFile.write

    def seen(self: DirectFile, view: memoryview, offset_bytes: int, label: str) -> None:
        ends.append(offset_bytes + len(view))
        real(self, view, offset_bytes, label)

    monkeypatch.setattr(DirectFile, "write", seen)
    monkeypatch.setattr(direct_rates, "BUDGET_S", 1000)
    measure_direct(str(file), 4 * MIN_BYTES)
    assert sorted(ends) == [4 * 1024**2 * (index + 1) for index in range(16)], "every block once"
    ends.clear()
    monkeypatch.setattr(direct_rates, "BUDGET_S", 0)
    measure_direct(str(file), 4 * MIN_BYTES)
    assert len(ends) == 8
