"""scripts/gpu_checks.py loses nothing when it is killed, and what it plans fits the loan of a GPU."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from types import ModuleType

import pytest

# Parts that take a fraction of a second, one that fails and one that leaves a child behind; archived all the time.
FAKE_RUN = """
import importlib.util, sys
from pathlib import Path
spec = importlib.util.spec_from_file_location("gpu_checks", sys.argv[1])
checks = importlib.util.module_from_spec(spec)
sys.modules["gpu_checks"] = checks
spec.loader.exec_module(checks)
sh = lambda text: ["sh", "-c", text]
parts = [
    checks.Part(f"part{n}", 5, {
        "one": sh("for i in 1 2 3 4 5 6 7 8 9; do echo line $i; sleep 0.02; done; echo end > {out}/found"),
        "two": sh("seq 100000; sleep 0.1; echo FAILED by itself; exit %d" % (n % 2)),
    })
    for n in range(40)
]
checks.EVERY_S = 0.03
checks.parts = lambda run, rehearse=False: parts
checks.check_budgets = lambda run: None
sys.exit(checks.main([sys.argv[2], "run=A"]))
"""


@pytest.fixture(scope="module")
def script(repo_root: Path) -> Path:
    return repo_root / "scripts" / "gpu_checks.py"


@pytest.fixture(scope="module")
def checks(script: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_checks_here", script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def archived(path: Path) -> dict[str, bytes]:
    with tarfile.open(fileobj=io.BytesIO(path.read_bytes())) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar.getmembers()}  # type: ignore[union-attr]


def test_what_was_finished_survives_ten_kills(script: Path, tmp_path: Path) -> None:
    """Each run is killed at a random moment of its first seconds; every part that it called done is in the archive."""
    draw = random.Random(20261129)
    num_done = 0
    for number in range(10):
        out, work = tmp_path / f"out{number}", tmp_path / f"work{number}"
        work.mkdir()
        with subprocess.Popen(
            [sys.executable, "-S", "-c", FAKE_RUN, str(script), str(out)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "TMPDIR": str(work)},
        ) as run:
            assert run.stdout is not None
            # Parts that it may finish before the kill, which then comes at any moment of the next one.
            said = "".join(run.stdout.readline() for _ in range(draw.randrange(0, 7)))
            time.sleep(draw.uniform(0.0, 0.3))
            run.send_signal(signal.SIGKILL)
            said += run.stdout.read()
        done = [line.split(":")[0] for line in said.splitlines() if ": done in" in line]
        num_done += len(done)
        if not (out / "A.tar.gz").exists():
            assert not done, said
            continue
        files = archived(out / "A.tar.gz")
        finished = {part["part"]: part["failures"] for part in json.loads(files["A/parts.json"])["parts"]}
        assert set(done) <= set(finished)
        for name in done:
            assert files[f"A/{name}/found"] == b"end\n"
            assert files[f"A/{name}/one.log"].count(b"line") == 9
            assert len(files[f"A/{name}/two.log"]) < 600_000
            failed = "FAILED by itself" in finished[name].get("two", "")
            assert failed == (int(name.removeprefix("part")) % 2 == 1)
        assert {part["part"] for part in json.loads((out / "A.json").read_text())["parts"]} >= set(done[:-1])
        assert {path.name.removesuffix(".new") for path in out.iterdir()} == {"A.json", "A.tar.gz"}
    assert num_done > 5


def test_a_part_that_hangs_costs_its_own_result(checks: ModuleType, tmp_path: Path) -> None:
    out, work = tmp_path / "out", tmp_path / "work"
    out.mkdir()
    work.mkdir()
    hangs = checks.Part("hangs", 1, {"it": ["sh", "-c", "echo begun; sleep 600 & sleep 600"]})
    quick = checks.Part("quick", 5000, {"it": ["sh", "-c", "echo {limit} {soft}"]})
    archive = checks.Archive(out, "B", work)
    assert not checks.run_parts([hangs, quick], archive, work)
    assert [outcome["failures"] for outcome in archive.outcomes] == [{"it": "it: stopped after 1 s"}, {}]
    files = archived(out / "B.tar.gz")
    assert "B/hangs/it.log" in files
    limit_s, soft_s = map(float, files["B/quick/it.log"].split())
    assert 4000 < soft_s < limit_s <= 5001


def test_seconds_that_a_part_leaves_go_to_the_next(checks: ModuleType, tmp_path: Path) -> None:
    parts = [checks.Part(f"part{n}", 5000, {"it": ["true"]}) for n in range(3)]
    archive = checks.Archive(tmp_path, "A", tmp_path)
    assert checks.run_parts(parts, archive, tmp_path)
    limits = [outcome["limit_s"] for outcome in archive.outcomes]
    assert limits[0] == 5000
    assert 9000 < limits[1] <= 10_000
    assert 13_000 < limits[2] <= 15_000


def test_long_logs_keep_both_ends_and_the_archive_its_size(checks: ModuleType, tmp_path: Path) -> None:
    out, work = tmp_path / "out", tmp_path / "work"
    out.mkdir()
    work.mkdir()
    draw = random.Random(1)
    for number in range(40):
        (work / f"log{number:02}").write_bytes(b"first" + draw.randbytes(600_000) + b"last")
    checks.Archive(out, "A", work).write()
    assert (out / "A.tar.gz").stat().st_size < 16 * 1024**2
    files = archived(out / "A.tar.gz")
    assert len(files) == 1 + 29
    assert files["A/log00"].startswith(b"first")
    assert files["A/log00"].endswith(b"last")
    assert b"bytes left out" in files["A/log00"]


@pytest.mark.parametrize("run", ["A", "B"])
def test_a_run_fits_its_loan(checks: ModuleType, run: str, repo_root: Path) -> None:
    checks.check_budgets(run)
    parts = checks.parts(run)
    assert len({part.name for part in parts}) == len(parts)
    words = [word for part in parts for command in part.commands.values() for word in command]
    files = [word for word in words if word.startswith("tests/")]
    assert all((repo_root / file).is_file() for file in files)
    assert len(set(files)) == len(files)
    checks.START_S += 20
    with pytest.raises(SystemExit, match="sum up to"):
        checks.check_budgets(run)
    checks.START_S -= 20


def test_every_file_with_gpu_tests_is_in_run_a(checks: ModuleType, repo_root: Path) -> None:
    parts = checks.parts("A")
    planned = {word for part in parts for command in part.commands.values() for word in command if "test_" in word}
    marked = {
        path.relative_to(repo_root).as_posix()
        for path in (repo_root / "tests").rglob("test_*.py")
        if "mark.gpu" in path.read_text() and path.name != Path(__file__).name
    }
    assert marked <= planned


@pytest.mark.parametrize("words", [[], ["run=A"], ["out", "run=C"], ["out"], ["out", "run=A", "fast=1"]])
def test_words_that_it_does_not_know(checks: ModuleType, words: list[str]) -> None:
    assert checks.main(words) == 2
