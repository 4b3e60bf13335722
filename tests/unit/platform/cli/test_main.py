"""The console script itself."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from headrace.platform.cli import main as console
from headrace.storage.core.errors import ErrorId


@pytest.mark.parametrize(("verb", "package"), [("plan", "hydra"), ("train", "omegaconf")])
def test_a_missing_package_is_named(verb: str, package: str) -> None:
    """Exit code 2 and one sentence, as on a machine that has torch alone."""
    code = f"import sys; sys.modules[{package!r}] = None; from headrace.platform.cli.main import main\n"
    code += f"sys.exit(main([{verb!r}]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert f"package {package}," in done.stderr
    assert f"[{ErrorId.package_missing}]" in done.stderr


def run_on_full_disk(words: list[str], *, errors_too: bool = False, cwd: Path | None = None) -> tuple[int, str]:
    """The exit code and standard error of a verb whose standard output is a full disk."""
    code = "import sys; from headrace.platform.cli.main import main; sys.exit(main())"
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", code, *words],
            stdout=full,
            stderr=full if errors_too else subprocess.PIPE,
            text=True,
            check=False,
            cwd=cwd,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[4])},
        )
    return done.returncode, done.stderr or ""


@pytest.mark.parametrize("words", [["--version"], *([verb, "--help"] for verb in console.VERBS)], ids=" ".join)
def test_every_verb_says_that_its_output_went_to_a_full_disk(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        code = console.main(words)
    check_said(words, code, capsys.readouterr().err)


@pytest.mark.parametrize("words", [["--help"], ["plan"], ["train", "--dry-run"], ["bench", "--list"]], ids=" ".join)
def test_a_process_says_that_its_output_went_to_a_full_disk(words: list[str], tmp_path: Path) -> None:
    code, said = run_on_full_disk(words, cwd=tmp_path)
    assert "Traceback" not in said
    check_said(words, code, said)


def check_said(words: list[str], code: int, said: str) -> None:
    assert "No space left on device" in said
    assert f"[{ErrorId.machine_lacks}]" in said
    assert code == (0 if words[:1] in console.RECORDED else 2)


@pytest.mark.parametrize(("words", "code"), [(["plan"], 2), (["plan", "modle=x"], 2), (["train", "--dry-run"], 0)])
def test_both_outputs_on_a_full_disk_keep_the_exit_code(words: list[str], code: int, tmp_path: Path) -> None:
    assert run_on_full_disk(words, errors_too=True, cwd=tmp_path)[0] == code


@pytest.mark.parametrize("words", [["plan"], ["train", "--dry-run"]], ids=" ".join)
def test_a_reader_that_goes_away_is_no_error(words: list[str], tmp_path: Path) -> None:
    code = "import sys; from headrace.platform.cli.main import main; sys.exit(main())"
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    os.close(writer)
    assert done.returncode == 0
    assert "Traceback" not in done.stderr
    assert "cannot be written" not in done.stderr


def test_an_error_of_a_verb_is_not_taken_for_one_of_the_output(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(argv: list[str]) -> int:
        raise OSError(28, "No space left on device", "/data")

    monkeypatch.setattr("headrace.platform.cli.plan.run", fail)
    with pytest.raises(OSError, match="/data"):
        console.main(["plan"])
