from __future__ import annotations

import mmap
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from threading import Event, Thread

import pytest
import torch

from headrace.bench import tier_overlap, tiers
from headrace.bench.harness import OptionValue, Row, run_bench
from headrace.bench.tier_fio import Fio
from headrace.bench.tier_overlap import Rates, judge
from headrace.bench.tier_place import cached_pages, file_system, scratch_folder
from headrace.bench.tier_rounds import Pass, neighbour_ratios, numbers, take_turns
from headrace.bench.tier_settings import parse_size, read_settings, size_name
from headrace.bench.tier_traffic import TierTraffic, random_bytes
from headrace.storage.blockio.direct_file import DirectProbe
from headrace.storage.build import open_stack
from headrace.storage.config import SsdTierConfig, TiersConfig
from headrace.storage.core.errors import InputError, MachineError, TransferFailed
from headrace.storage.core.records import Direction, Medium
from headrace.storage.tiers.ssd_slab import SsdSlab
from headrace.storage.transfer_log import TransferLog

CPU = torch.device("cpu")
MIB = 1024**2
KIB = 1024


def quick(tmp_path: Path, **changed: OptionValue) -> dict[str, OptionValue]:
    """One round over 1 MiB, in a folder of the test."""
    small = {"sizes": "64K,256K", "rounds": 1, "host_mib": 1, "ssd_mib": 1, "device": "cpu", "stretch_s": 0.1}
    return {**tiers.OPTIONS, **small, "folder": str(tmp_path / "drive"), **changed}


def measured(options: Mapping[str, OptionValue], tmp_path: Path) -> dict[str, Row]:
    _, rows = run_bench("tiers", options, tmp_path / "results")
    assert len({row.name for row in rows}) == len(rows)
    return {row.name: row for row in rows}


def left_over(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "drive").rglob("*"))


def test_a_steady_drift_of_the_machine_cancels() -> None:
    rates = [4.0 * 0.7**index for index in range(7)]
    assert neighbour_ratios(rates[1::2], rates[::2]) == pytest.approx([1.0, 1.0, 1.0])
    slower = [0.9 * rate for rate in rates[1::2]]
    assert neighbour_ratios(slower, rates[::2]) == pytest.approx([0.9, 0.9, 0.9])


def test_passes_without_both_neighbours_cannot_be_compared() -> None:
    assert neighbour_ratios([1.0], []) == []
    with pytest.raises(ValueError, match="2 passes want 3"):
        neighbour_ratios([1.0, 1.0], [1.0, 1.0])


def test_the_machine_runs_first_last_and_between() -> None:
    turns: list[str] = []

    def side(name: str, wall_s: float, cpu_s: float | None = None):
        return lambda: turns.append(name) or Pass(10**9, wall_s, cpu_s)

    series, around = take_turns({"on": (side("on", 2.0, 4.0), 3), "off": (side("off", 1.0), 1)}, side("fio", 1.0))
    assert turns == ["fio", "on", "fio", "off", "fio", "on", "fio", "on", "fio"]
    assert len(around) == 5
    assert series["on"].ratios == [0.5] * 3
    assert series["off"].ratio == 1.0
    row = numbers(series["on"], around)
    assert (row["ours_gbps"], row["machine_gbps"], row["ratio"], row["rounds"]) == (0.5, 1.0, 0.5, 3)
    assert row["ours_cpu_s_per_gib"] == pytest.approx(4.0 * 1024**3 / 1e9)
    assert row["machine_cpu_s_per_gib"] is None


def test_without_the_machine_there_is_no_ratio() -> None:
    series, around = take_turns({"": (lambda: Pass(1, 1.0), 2)}, None)
    row = numbers(series[""], around)
    assert row["rounds"] == 2
    assert row["ratio"] is row["machine_gbps"] is row["ratio_min"] is None


def test_sizes_and_their_names() -> None:
    assert [parse_size(word) for word in ("64K", "4m", "8192")] == [64 * KIB, 4 * MIB, 8192]
    assert [size_name(size) for size in (64 * KIB, 256 * MIB, 1024 * MIB)] == ["64KiB", "256MiB", "1GiB"]
    for word in ("0", "4X", "1000", "-4K"):
        with pytest.raises(InputError, match=f"sizes={word}"):
            parse_size(word)


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("sizes", "2M", "more than a pass of host_mib=1"),
        ("sizes", ",", "at least one"),
        ("tiers", "host,tape", "tiers=tape"),
        ("rounds", 0, "rounds=0: at least 1"),
        ("in_flight", 0, "in_flight=0"),
        ("engine", "ring", "on cpu the engine is posix"),
        ("engine", "fast", "engine=fast"),
        ("direct", "maybe", "direct=maybe"),
        ("device", "tpu", "device=tpu"),
    ],
)
def test_options_that_make_no_sense_are_refused(key: str, value: OptionValue, told: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=told):
        read_settings(quick(tmp_path, **{key: value}))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_cuda_device_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no CUDA device"):
        read_settings(quick(tmp_path, device="cuda"))


def test_every_case_is_a_row_and_nothing_is_left(
    tmp_path: Path, fake_fio: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tier_overlap, "CPU_SIZE", 512)
    rows = measured(quick(tmp_path, fio=fake_fio), tmp_path)
    for bed in ("host/memcpy", "ssd/posix"):
        for case in ("write/64KiB", "read/64KiB", "write/256KiB", "read/256KiB"):
            row = rows.pop(f"{bed}/{case}")
            assert row.error is None
            assert row.target is None, "nothing is promised below 4 MiB"
            assert (row.numbers["ours_gbps"] or 0) > 0
            assert (row.numbers["ratio"] or 0) > 0
            assert row.config["checksum"] is True
            assert row.config["pass_bytes"] == MIB
        overlap = rows.pop(f"{bed}/overlap")
        assert overlap.error is None
        assert overlap.target is not None
        assert (overlap.numbers["traffic_gbps"] or 0) > 0
        assert (overlap.numbers["processor_share_pct"] or 0) > 0
    pages = rows.pop("ssd/posix/page_cache")
    if pages.config["direct"]:
        assert pages.numbers["cached_pages"] == 0
        assert pages.target is not None
        assert pages.target.met
    # A file system that refuses O_DIRECT says so, in a row of its own.
    assert list(rows) == ([] if pages.config["direct"] else ["ssd/direct"])
    assert left_over(tmp_path) == []


def test_targets_from_4_mib_up_and_what_the_checksum_costs(tmp_path: Path, fake_fio: str) -> None:
    rows = measured(quick(tmp_path, fio=fake_fio, sizes="4M", ssd_mib=8, tiers="ssd", overlap=False), tmp_path)
    row, bare = rows["ssd/posix/write/4MiB"], rows["ssd/posix/write/4MiB/no_checksum"]
    assert row.target is not None
    assert row.target.text == "at least 90% of fio"
    assert row.target.met == ((row.numbers["ratio"] or 0) >= 0.9)
    assert row.numbers["machine_gbps"] == pytest.approx(8 * MIB / 0.01 / 1e9)
    assert row.numbers["machine_cpu_s_per_gib"] == pytest.approx(0.005 * 128)
    assert bare.target is None
    assert bare.config["checksum"] is False
    assert (bare.numbers["speed_over_checksum_on"] or 0) > 0


@pytest.mark.parametrize(
    ("warm_gbps", "block_bytes", "num_blocks"),
    [
        (None, 4 * MIB, 128),
        (None, 64 * KIB, 8192),  # the first case writes every byte of the file
        (10.0, 4 * MIB, 128),
        (0.7, 4 * MIB, 58),  # 0.35 s of 0.7 GB/s
        (0.1, 4 * MIB, 32),
        (0.1, 256 * MIB, 2),
        (10.0, 64 * KIB, tiers.MOST_BLOCKS),
    ],
)
def test_a_slow_drive_moves_less_per_pass(warm_gbps: float | None, block_bytes: int, num_blocks: int) -> None:
    bed = tiers.Bed("ssd/posix", Medium.ssd, 512 * MIB, {}, None, (0.9, "fio"), {}, warm_gbps=warm_gbps)
    assert tiers._num_blocks(bed, block_bytes) == num_blocks


def test_fio_is_given_the_same_blocks_and_range(
    tmp_path: Path, fake_fio: str, words_of_fio: Callable[[], list[dict[str, str]]]
) -> None:
    rows = measured(quick(tmp_path, fio=fake_fio, tiers="ssd", sizes="256K", num_threads=1, overlap=False), tmp_path)
    config = rows["ssd/posix/write/256KiB"].config
    calls = [call for call in words_of_fio() if call["ioengine"] == "libaio" and call["bs"] == str(256 * KIB)]
    assert {call["rw"] for call in calls} == {"write", "read"}
    for call in calls:
        assert (call["bs"], call["size"], call["offset"]) == (str(256 * KIB), str(MIB), "0")
        assert (call["ioengine"], call["iodepth"]) == ("libaio", "2")
        assert call["direct"] == str(int(config["direct"]))
        assert call["filename"].startswith(f"/proc/{os.getpid()}/fd/"), "the slab file has no other name"
    assert config["machine_in_flight"] == 2
    assert config["machine"] == "fio-fake, the best of: libaio; libaio, huge pages; psync; psync, huge pages"
    assert config["machine_setting"] == "libaio"


def test_without_fio_our_own_rates_are_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    rows = measured(quick(tmp_path, tiers="ssd", sizes="64K", overlap=False), tmp_path)
    assert "apt-get install fio" in (rows["ssd/fio"].error or "")
    row = rows["ssd/posix/write/64KiB"]
    assert row.error is None
    assert (row.numbers["ours_gbps"] or 0) > 0
    assert row.numbers["ratio"] is None


def test_a_fio_that_fails_costs_its_case_alone(tmp_path: Path, fake_fio: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def fail_later(*words: object) -> Pass:
        calls.append(words)
        if len(calls) == 2:
            raise MachineError("fio ended with 1")
        return Pass(MIB, 0.01)

    monkeypatch.setattr(Fio, "move", fail_later)
    rows = measured(quick(tmp_path, fio=fake_fio, tiers="ssd", sizes="64K", overlap=False), tmp_path)
    assert rows["ssd/posix/write/64KiB"].error == "fio ended with 1"
    assert rows["ssd/posix/read/64KiB"].error is None


def test_a_folder_in_memory_is_refused(tmp_path: Path) -> None:
    if file_system(Path("/dev/shm")) != "tmpfs":
        pytest.skip("/dev/shm is no tmpfs here")
    with pytest.raises(InputError, match="folder=/dev/shm is a tmpfs"):
        list(tiers.run(quick(tmp_path, tiers="ssd", folder="/dev/shm")))


def test_the_file_system_of_a_mount_point(tmp_path: Path) -> None:
    assert file_system(Path("/proc")) == "proc"
    assert file_system(Path("/proc/self/fd")) == "proc"
    assert file_system(tmp_path) not in ("", "proc")


def test_pages_that_stay_in_the_cache_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(8 * mmap.PAGESIZE))
    assert cached_pages(str(path), 0, 8 * mmap.PAGESIZE) == 8
    assert cached_pages(str(path), 4 * mmap.PAGESIZE, 4 * mmap.PAGESIZE) == 4
    if file_system(tmp_path) in ("tmpfs", "ramfs"):
        pytest.skip("what lies in memory cannot leave the page cache")
    with path.open("rb+") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    assert cached_pages(str(path), 0, 8 * mmap.PAGESIZE) == 0


def test_a_file_system_that_refuses_direct_is_named_and_measured_all_the_same(
    tmp_path: Path, fake_fio: str, words_of_fio: Callable[[], list[dict[str, str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiers, "probe_direct", lambda folder: DirectProbe(False, "refused by the test"))
    rows = measured(quick(tmp_path, fio=fake_fio, tiers="ssd", sizes="64K", overlap=False), tmp_path)
    assert "refused by the test" in (rows["ssd/direct"].error or "")
    assert rows["ssd/posix/write/64KiB"].config["direct"] is False
    assert {call["direct"] for call in words_of_fio()} == {"0"}
    pages = rows["ssd/posix/page_cache"]
    assert pages.target is None
    assert (pages.numbers["cached_pages"] or 0) >= MIB // mmap.PAGESIZE, "the writes went through the page cache"


def test_wrong_bytes_void_the_case(tmp_path: Path) -> None:
    """A damaged file, no checksum in the tier: the benchmark's own comparison finds it, in the sample and in full."""
    with SsdSlab(tmp_path, 2 * MIB) as slab:
        lease = slab.lease("rank0", 2 * MIB)
        config = TiersConfig(ssd=SsdTierConfig(num_threads=1), checksum=False)
        stack = open_stack([lease], config, device=CPU, log=TransferLog())
        traffic = TierTraffic(stack, Medium.ssd, random_bytes(MIB, CPU), in_flight=2)
        traffic.use_blocks(256 * KIB, 4)
        traffic.store_pass()
        assert traffic.load_pass(check_all=True).num_bytes == MIB
        with open(lease.path, "r+b") as file:
            file.seek(lease.offset_bytes + MIB - 7)
            byte = file.read(1)[0]
            file.seek(lease.offset_bytes + MIB - 7)
            file.write(bytes([byte ^ 1]))
            os.fsync(file.fileno())
        with pytest.raises(TransferFailed, match="came back from the ssd tier with other bytes"):
            traffic.load_pass()
        with pytest.raises(TransferFailed, match="other bytes"):
            traffic.load_pass(check_all=True)
        stack.close()


def test_a_slot_holds_other_bytes_in_every_pass(tmp_path: Path) -> None:
    """So that a store which wrote nothing is found."""
    with SsdSlab(tmp_path, MIB) as slab:
        lease = slab.lease("rank0", MIB)
        stack = open_stack([lease], TiersConfig(), device=CPU, log=TransferLog())
        traffic = TierTraffic(stack, Medium.ssd, random_bytes(MIB, CPU), in_flight=1)
        traffic.use_blocks(256 * KIB, 4)
        seen = set()
        for _ in range(2):
            traffic.store_pass()
            seen.add(Path(lease.path).read_bytes()[lease.offset_bytes : lease.offset_bytes + 256 * KIB])
        assert len(seen) == 2
        stack.close()


def test_traffic_flows_both_ways_until_it_is_stopped(tmp_path: Path) -> None:
    with SsdSlab(tmp_path, 4 * MIB) as slab:
        log = TransferLog()
        stack = open_stack([slab.lease("rank0", 4 * MIB)], TiersConfig(), device=CPU, log=log)
        traffic = TierTraffic(stack, Medium.ssd, random_bytes(MIB, CPU), in_flight=2)
        traffic.use_blocks(64 * KIB, traffic.blocks_of_flow())
        stop = Event()

        def stop_once_both_ways() -> None:
            while not all(log.moved_bytes[Medium.ssd, direction] for direction in Direction):
                time.sleep(0.001)
            stop.set()

        Thread(target=stop_once_both_ways, daemon=True).start()
        traffic.flow(stop)
        assert traffic.moved_bytes == sum(log.moved_bytes.values()) > 0
        stored, loaded = (log.moved_bytes[Medium.ssd, direction] for direction in Direction)
        assert stored == loaded
        assert stack.stats()[Medium.ssd].used_bytes == 0
        stack.close()


def test_what_is_lost_is_compared_with_the_share_of_memory() -> None:
    rates = Rates([2.0, 2.0], [1.5], [2.0], traffic_alone_gbps=[3.0], plain_gbps=[10.0], traffic_cpu_s_per_gb=[0.3])
    row = judge("ssd", rates, 3.0, {})
    assert row.numbers["lost_share_pct"] == pytest.approx(25.0)
    assert row.numbers["slowdown_pct"] == pytest.approx(100 / 3)
    assert row.numbers["memory_share_pct"] == pytest.approx(30.0)
    assert row.numbers["processor_share_pct"] == pytest.approx(60.0 / len(os.sched_getaffinity(0)))
    assert row.target is not None
    assert row.target.met
    row = judge("host", rates, 2.0, {})
    assert row.numbers["memory_share_pct"] == pytest.approx(20.0)
    assert row.target is not None
    assert not row.target.met


@pytest.mark.parametrize(("beside", "met"), [(98.0, True), (96.0, False)])
def test_on_a_gpu_the_slowdown_has_a_bound(beside: float, met: bool) -> None:
    row = judge("ring", Rates([100.0, 100.0], [beside], [50.0], [50.0], [], [0.1]), 2.0, {})
    assert row.target is not None
    assert (row.target.text, row.target.met) == ("at most 3 % slower", met)
    assert "memory_share_pct" not in row.numbers


def test_what_does_not_fit_the_time_says_so(tmp_path: Path, fake_fio: str) -> None:
    rows = measured(quick(tmp_path, fio=fake_fio, sizes="64K", limit_s=0.0), tmp_path)
    assert "ssd/posix/page_cache" in rows, "nothing was written, so nothing can be said of its pages"
    assert {row.error for row in rows.values()} == {tiers.TOO_LATE}


def test_a_slow_tier_leaves_the_next_one_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiers.time, "monotonic", lambda: 100.0)
    assert tiers._share_of_time(340.0, 2) == 220.0
    assert tiers._share_of_time(340.0, 1) == 340.0


def test_a_tier_without_room_is_a_row(tmp_path: Path, fake_fio: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*words: object, **more: object) -> None:
        raise MachineError("host tier: no room")

    monkeypatch.setattr(tiers, "HostSlab", refuse)
    rows = measured(quick(tmp_path, fio=fake_fio, sizes="64K", overlap=False), tmp_path)
    assert rows["host"].error == "host tier: no room"
    assert rows["ssd/posix/write/64KiB"].error is None


def test_the_folder_that_was_made_goes_again(tmp_path: Path) -> None:
    with scratch_folder(str(tmp_path / "new")) as folder:
        (folder / "file").write_text("x")
        assert folder.parent == tmp_path / "new"
    assert not (tmp_path / "new").exists()
    (tmp_path / "old").mkdir()
    with scratch_folder(str(tmp_path / "old")):
        pass
    assert list((tmp_path / "old").iterdir()) == []


@pytest.mark.slow
def test_sigterm_leaves_nothing_behind(tmp_path: Path, fake_fio: str) -> None:
    drive = tmp_path / "drive"
    words = [f"{key}={value}" for key, value in quick(tmp_path, fio=fake_fio, tiers="ssd", rounds=100_000).items()]
    command = [sys.executable, "-m", "headrace.platform.cli.main", "bench", "tiers", *words]
    command = [word for word in command if not word.endswith("=")]
    bench = subprocess.Popen([*command, f"out={tmp_path / 'results'}"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        until_s = time.monotonic() + 600
        log = tmp_path / "fio.log"
        while not log.exists():  # in the middle of its passes
            assert bench.poll() is None, bench.communicate()
            assert time.monotonic() < until_s
            time.sleep(0.02)
        bench.send_signal(signal.SIGTERM)
        assert bench.wait(600) == 128 + signal.SIGTERM
    finally:
        bench.kill()
        bench.communicate()
    assert not drive.exists()
    assert list((tmp_path / "cache").rglob("*.json")) == []
