"""`headrace doctor`: words, output and exit codes."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from headrace.platform.children import PartResult
from headrace.platform.cli.main import main
from headrace.platform.doctor import diagnosis, machine_profile
from headrace.platform.doctor.check import fail, passed, warn

FINE, SLOW, BROKEN = passed("a", "fine"), warn("b", "slow", "a faster one"), fail("c", "broken", "mend it")


@pytest.mark.slow
def test_this_machine_in_half_a_minute(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # A busy machine may take longer, so CPU seconds are counted and no part is cut short.
    monkeypatch.setattr(diagnosis, "LIMITS_S", dict.fromkeys(diagnosis.LIMITS_S, 250.0))
    before = os.times()
    code = main(["doctor", f"dir={tmp_path}", "--json"])
    assert sum(os.times()[:4]) - sum(before[:4]) < 30
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert code == (0 if found["ok"] else 1)
    assert found["ok"] is (found["fail"] == 0)
    assert found["pass"] + found["warn"] + found["fail"] == len(found["checks"]) == 20
    assert {"gemm", "dali", "disk", "ray token"} <= {c["name"] for c in found["checks"] if c["status"] == "pass"}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("checks", "code"), [([FINE, SLOW], 0), ([FINE, BROKEN, SLOW], 1)])
def test_lines_and_exit_code(
    checks: list[object], code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(diagnosis, "diagnose", lambda folder, interface: iter(checks))
    assert main(["doctor"]) == code
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["pass", "a", "fine"]
    assert any(line.split() == ["warn", "b", "slow"] for line in lines)
    assert any(line.strip() == "-> a faster one" for line in lines)
    assert any("mend it" in line for line in lines) is bool(code)
    assert main(["doctor", "--json"]) == code
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [check["name"] for check in found["checks"]] == [check.name for check in checks]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--jsn"], "unknown flag --jsn; did you mean `--json`?"),
        (["folder=/tmp"], "no key 'folder'; known: dir, out, name, cluster.interface"),
        (["dri=/tmp"], "did you mean `dir`?"),
        (["dir="], "dir= has no value; give dir=..."),
        (["dir=/tmp", "dir=/tmp"], "given twice"),
        (["dir=/nowhere"], "dir=/nowhere is no folder"),
        (["out=/tmp"], "out=... goes with --profile"),
        (["--profile", "name=a/b"], "letters, digits"),
        (["--profile", "cluster.interface=lo"], "cluster.interface=lo: a profile tries no network"),
    ],
)
def test_bad_words_are_named(words: list[str], reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", *words]) == 2
    assert reason in capsys.readouterr().err


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--help"]) == 0
    assert "--profile" in capsys.readouterr().out


def test_a_profile_is_written_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run_part(module: str, words: list[str], *, limit_s: float) -> PartResult:
        if words[0] == "disk":
            return PartResult((), "PermissionError: no", 1.0)
        return PartResult(({"what": "cpu_gemm", "dtype": "float32", "tflops": 0.5},), None, 1.0)

    monkeypatch.setattr(machine_profile, "run_part", run_part)
    words = ["doctor", "--profile", f"dir={tmp_path}", f"out={tmp_path / 'out'}", "name=mine"]
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["name"] == "mine"
    assert found["measured"] == {"fp32_tflops": 0.5}
    assert found["left_out"]["disk"] == "PermissionError: no"
    assert Path(found["rows_file"]).is_file()
    assert "fp32_tflops: 0.5" in Path(found["hardware_file"]).read_text()
    assert main(words) == 0
    assert "disk (PermissionError: no)" in capsys.readouterr().out


@pytest.mark.parametrize("there", [True, False])
def test_whether_there_is_a_gpu_is_asked_of_torch(
    there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Some sandboxed machines with a GPU have no /proc/driver/nvidia, and a driver may be there without a GPU."""
    asked: list[str] = []

    def run_part(module: str, words: list[str], *, limit_s: float) -> PartResult:
        asked.append(words[0])
        return PartResult((), "not here", 1.0)

    monkeypatch.setattr(machine_profile, "run_part", run_part)
    monkeypatch.setattr("torch.cuda.is_available", lambda: there)
    assert main(["doctor", "--profile", f"dir={tmp_path}", f"out={tmp_path / 'out'}"]) == 1
    assert ({"copy", "gemm"} <= set(asked)) is there
    assert ("no GPU" in capsys.readouterr().err) is not there


def test_a_profile_of_nothing_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(machine_profile, "run_part", lambda *args, **kw: PartResult((), "no torch", 1.0))
    assert main(["doctor", "--profile", f"dir={tmp_path}", f"out={tmp_path / 'out'}"]) == 1
    assert "nothing could be measured" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
