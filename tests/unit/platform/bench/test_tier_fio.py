"""fio as the bench runs it: what it is told, what is believed of its answer."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from headrace.bench.tier_fio import FileRange, Fio, Setting, find_fio, read_answer
from headrace.storage.core.errors import InputError, MachineError
from headrace.storage.core.records import Direction

MIB = 1024**2
KIB = 1024
WordsOfFio = Callable[[], list[dict[str, str]]]


def test_a_path_that_is_no_program_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"fio=.*nothing: no program there; apt-get install fio"):
        find_fio(str(tmp_path / "nothing"))


def test_fio_that_moves_other_bytes_is_an_error(
    tmp_path: Path, fake_fio: str, words_of_fio: WordsOfFio, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = FileRange(str(tmp_path / "a:b"), 0, MIB, direct=True)
    fio = find_fio(fake_fio)
    assert fio.move(where, Direction.load, 64 * KIB, 4).gbps == pytest.approx(MIB / 0.01 / 1e9)
    assert words_of_fio()[0]["filename"] == str(tmp_path / "a\\:b"), "a colon would name two files"
    monkeypatch.setenv("FAKE_LOST", "4096")
    with pytest.raises(MachineError, match=f"moved {MIB - 4096} bytes"):
        fio.move(where, Direction.load, 64 * KIB, 4)
    with pytest.raises(MachineError, match="not its JSON"):
        read_answer("fio: bad option", Direction.load, 1)


def test_without_libaio_threads_share_the_range(
    tmp_path: Path, fake_fio: str, words_of_fio: WordsOfFio, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_ENGINE", "mmap")
    fio = find_fio(fake_fio)
    assert {setting.engine for setting in fio.settings} == {"psync"}
    fio.move(FileRange(str(tmp_path / "file"), 4 * MIB, 6 * MIB, direct=True), Direction.store, MIB, 4)
    words = words_of_fio()[0]
    assert (words["numjobs"], words["size"], words["offset"]) == ("3", str(2 * MIB), str(4 * MIB))
    assert words["offset_increment"] == str(2 * MIB)


@pytest.mark.parametrize("fast", ["io_uring", "io_uring huge", "psync"])
def test_the_fastest_setting_is_the_rate_and_is_found_once_per_kind_of_pass(
    fast: str, tmp_path: Path, fake_fio: str, words_of_fio: WordsOfFio, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_ENGINE", "io_uring")
    monkeypatch.setenv("FAKE_FAST", fast)
    fio, where = find_fio(fake_fio), FileRange(str(tmp_path / "file"), 0, MIB, direct=True)
    for _ in range(3):
        assert fio.move(where, Direction.load, 64 * KIB, 4).gbps == pytest.approx(MIB / 0.005 / 1e9)
    assert fio.setting_of(Direction.load, 64 * KIB) == fast.replace(" huge", ", huge pages")
    tried = [(words["ioengine"], words.get("iomem")) for words in words_of_fio()]
    each = [(engine, memory) for engine in ("io_uring", "psync") for memory in (None, "mmaphuge")]
    assert tried[:5] == [*each, each[0]], "every setting once, the first one twice"
    assert len(set(tried[5:])) == 1
    assert len(tried) == 5 + 3
    fio.move(where, Direction.store, 64 * KIB, 4)
    assert len(words_of_fio()) == 8 + 5 + 1, "writes have a best of their own"


def test_a_setting_that_the_machine_refuses_is_left_out_and_all_refused_is_an_error(
    tmp_path: Path, fake_fio: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = FileRange(str(tmp_path / "file"), 0, MIB, direct=True)
    monkeypatch.setenv("FAKE_REFUSED", "libaio huge,psync,psync huge")
    fio = find_fio(fake_fio)
    fio.move(where, Direction.load, 64 * KIB, 4)
    assert fio.setting_of(Direction.load, 64 * KIB) == "libaio"
    monkeypatch.setenv("FAKE_REFUSED", "libaio,libaio huge,psync,psync huge")
    with pytest.raises(MachineError, match="no room in huge pages"):
        find_fio(fake_fio).move(where, Direction.load, 64 * KIB, 4)


@pytest.mark.skipif(shutil.which("fio") is None, reason="no fio on PATH: apt-get install fio")
@pytest.mark.parametrize("engine", ["libaio", "psync"])
def test_the_real_fio_stays_in_its_range(engine: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(3 * MIB))
    found = find_fio("")
    fio = Fio(found.path, found.version, [Setting(engine, False)])
    done = fio.move(FileRange(str(path), MIB, MIB, direct=False), Direction.store, 64 * KIB, 4)
    assert done.num_bytes == MIB
    assert done.cpu_s is not None
    left, middle, right = (path.read_bytes()[begin : begin + MIB] for begin in (0, MIB, 2 * MIB))
    assert left == right == bytes(MIB)
    assert middle != bytes(MIB)
    assert len(path.read_bytes()) == 3 * MIB


def test_processor_time_of_fio_is_its_own() -> None:
    """Not that of its start: the shares of the job's time, as fio gives them."""
    text = '{"jobs": [{"read": {"io_bytes": 8, "runtime": 4}, "usr_cpu": 25, "sys_cpu": 50, "job_runtime": 4}]}'
    done = read_answer(text, Direction.load, 8)
    assert done.cpu_s == pytest.approx(0.003)
    assert done.wall_s == pytest.approx(0.004)
