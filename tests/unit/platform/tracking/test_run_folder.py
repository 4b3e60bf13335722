from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from enum import StrEnum
from pathlib import Path

import pytest

from headrace.platform.tracking import run_folder
from headrace.platform.tracking.run_folder import find_run, read_json, read_metrics
from headrace.storage.core import json_lines
from headrace.storage.core.errors import InputError
from headrace.storage.core.json_lines import JsonLines, legal_json, read_lines


class Colour(StrEnum):
    red = "red"


def lines_of(path: Path) -> list[dict]:
    return [line for line, _ in read_lines(path)]


def test_a_line_cut_by_a_kill_is_removed_and_the_run_goes_on_behind_it(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2, "lo')
    assert lines_of(path) == [{"step": 1}]
    lines = JsonLines(path)
    lines.append({"step": 2})
    lines.close()
    assert path.read_bytes() == b'{"step": 1}\n{"step": 2}\n'


@pytest.mark.parametrize("content", [b"", b'{"step": 1', b"\n", b"x" * 200_000])
def test_a_file_without_a_whole_line_starts_anew(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(content)
    lines = JsonLines(path)
    lines.append({"step": 1})
    lines.close()
    assert lines_of(path) == [{"step": 1}]


def test_not_finite_numbers_unicode_and_foreign_types_are_legal_json(tmp_path: Path) -> None:
    record = {
        "a": float("nan"),
        "b": -float("inf"),
        "c": "grün ✓ \ud800",
        "d": (1, Colour.red),
        "e": Path("/x"),
        3: True,
    }
    lines = JsonLines(tmp_path / "x.jsonl")
    lines.append(record)
    lines.close()

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    text = (tmp_path / "x.jsonl").read_text(encoding="utf-8")
    value = json.loads(text, parse_constant=refuse)
    assert value == {"a": None, "b": None, "c": "grün ✓ ?", "d": [1, "red"], "e": "/x", "3": True}
    assert legal_json(1.5) == 1.5
    assert legal_json(False) is False


def test_reading_goes_on_from_an_offset_and_skips_damage(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"step": 1}\nrubbish\n[1]\n{"step": 2}\n{"st')
    found = list(read_lines(path))
    assert [value for value, _ in found] == [{"step": 1}, {"step": 2}]
    assert next(read_lines(path, found[0][1]))[0] == {"step": 2}
    assert list(read_lines(path, found[1][1])) == []
    assert list(read_lines(tmp_path / "none")) == []


def test_steps_that_were_run_again_count_once_and_take_back_the_later_ones(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    history = [1, 2, 3, 4, 5, 3, 4]
    path.write_text("".join(json.dumps({"step": s, "at": i}) + "\n" for i, s in enumerate(history)))
    assert [(line["step"], line["at"]) for line in read_metrics(path)] == [(1, 0), (2, 1), (3, 5), (4, 6)]


def test_every_line_survives_sigkill(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom headrace.storage.core.json_lines import JsonLines\n"
        "lines = JsonLines(Path(sys.argv[1]))\nstep = 0\n"
        "while True:\n    step += 1\n    lines.append({'step': step})\n    print(step, flush=True)\n"
    )
    path = tmp_path / "metrics.jsonl"
    with subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        told = [int(child.stdout.readline()) for _ in range(50)]
        child.send_signal(signal.SIGKILL)
        told += [int(line) for line in child.stdout.read().split("\n") if line.strip().isdigit()]
    assert {line["step"] for line in read_metrics(path)} >= set(told)


def test_a_full_disk_keeps_the_lines_for_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.jsonl"
    lines = JsonLines(path)
    lines.append({"step": 1})
    real = os.pwrite
    monkeypatch.setattr(json_lines.os, "pwrite", lambda fd, data, at: real(fd, data[:4], at))
    error = lines.append({"step": 2})
    assert error is not None
    assert error.errno == 28
    assert path.read_bytes() == b'{"step": 1}\n'
    monkeypatch.setattr(json_lines.os, "pwrite", real)
    assert lines.append({"step": 3}) is None
    assert [line["step"] for line in lines_of(path)] == [1, 2, 3]
    lines.close()


def test_threads_write_whole_lines(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "x.jsonl")
    threads = [
        threading.Thread(target=lambda t=t: [lines.append({"t": t, "i": i}) for i in range(300)]) for t in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lines.close()
    assert len(lines_of(tmp_path / "x.jsonl")) == 1200


def test_ten_thousand_lines_are_quick(tmp_path: Path) -> None:
    begin = time.process_time()
    lines = JsonLines(tmp_path / "x.jsonl")
    for step in range(10_000):
        lines.append({"step": step, **{f"m{i}": 0.1 * i for i in range(25)}})
    lines.close()
    assert len(read_metrics(tmp_path / "x.jsonl")) == 10_000
    assert time.process_time() - begin < 5.0


def test_a_damaged_or_missing_json_file_is_empty(tmp_path: Path) -> None:
    assert read_json(tmp_path / "none.json") == {}
    for content in ("", "{", "[1]", "\x00"):
        (tmp_path / "x.json").write_text(content)
        assert read_json(tmp_path / "x.json") == {}


def test_writing_leaves_the_old_file_when_it_fails(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    run_folder.write_json(path, {"a": 1})
    with pytest.raises(UnicodeEncodeError):
        run_folder.write_text(path, "\ud800")
    assert read_json(path) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_a_run_is_found_by_path_name_and_age(tmp_path: Path) -> None:
    for number, name in enumerate(("old", "new")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text("a: 1")
        os.utime(tmp_path / name, (number + 1, number + 1))
    assert find_run("last", tmp_path).name == "new"
    assert find_run("old", tmp_path) == tmp_path / "old"
    assert find_run(str(tmp_path / "old")) == tmp_path / "old"
    with pytest.raises(InputError, match="no such folder"):
        find_run("nope", tmp_path)
    with pytest.raises(InputError, match="not a run folder"):
        find_run(str(tmp_path))
    with pytest.raises(InputError, match="headrace train"):
        find_run("last", tmp_path / "old")
