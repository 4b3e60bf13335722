"""Ways onto a cluster: `ray job submit` with a token, the Slurm script on two Ray nodes, a wheel by itself."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

pytestmark = [pytest.mark.ray, pytest.mark.soak]
ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
HEADRACE = (sys.executable, "-m", "headrace.platform.cli.main")
TINY = ("debug=cpu_tiny", "tiers.ssd.budget_gib=0")


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def has_begun(run: Path) -> bool:
    path = run / "metrics.jsonl"
    return path.exists() and path.read_text().count("\n") > 2


def wait_for(condition: Callable[[], bool], limit_s: float = 300.0) -> None:
    until_s = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < until_s
        time.sleep(0.1)


@pytest.fixture
def environ(tmp_path: Path) -> Iterator[Mapping[str, str]]:
    """A user of this machine who has neither a token nor a head.

    Ray's folder is an own and a short one: Ray notes there which cluster of the machine is the newest, and a submitted
    job would join that one.
    """
    home = tmp_path / "home"
    home.mkdir()
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True) as short:
        own = {"HOME": str(home), "XDG_CACHE_HOME": str(home / "cache"), "RAY_TMPDIR": short, "PYTHONPATH": str(ROOT)}
        yield {**kept, **own}


@pytest.fixture
def submit(environ: Mapping[str, str]) -> Iterator[Callable[..., subprocess.CompletedProcess[str]]]:
    """Calls `ray job WORD ...` for a head with a token; variables are added."""
    env = {**environ, "RAY_JOB_STOP_WAIT_TIME_S": "120"}
    head = subprocess.run([*HEADRACE, "dashboard", "--json"], env=env, capture_output=True, text=True, check=True)
    url = json.loads(head.stdout.splitlines()[-1])["dashboard_url"]

    def call(word: str, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
        command = [str(BIN / "ray"), "job", word, "--address", url, *words]
        return subprocess.run(command, env={**env, **more}, capture_output=True, text=True, check=False, timeout=600)

    yield call
    subprocess.run([*HEADRACE, "dashboard", "--stop"], env=env, check=True)


def test_a_submitted_job_trains_and_stops_with_a_checkpoint(submit, tmp_path: Path) -> None:
    words = ["--", *HEADRACE, "train", *TINY]
    refused = submit("submit", *words, RAY_AUTH_MODE="disabled")
    assert refused.returncode != 0
    assert "authentication" in refused.stderr.lower()

    stopped = tmp_path / "stopped"
    begun = submit(
        "submit",
        "--no-wait",
        "--submission-id",
        "long",
        *words,
        f"run.dir={stopped}",
        "train.steps=100000",
        RAY_AUTH_MODE="token",
    )
    assert begun.returncode == 0, begun.stdout + begun.stderr
    wait_for(lambda: has_begun(stopped))
    assert submit("stop", "long", RAY_AUTH_MODE="token").returncode == 0
    wait_for(lambda: json.loads((stopped / "summary.json").read_text()).get("outcome") == "stopped")
    assert list((stopped / "checkpoints").glob("step_*/COMMITTED"))


class TwoNodes:
    """scripts/cluster/slurm.sh with two Ray nodes on this machine: a `srun` that runs its words here."""

    def __init__(self, folder: Path, environ: Mapping[str, str], job_id: int) -> None:
        programs = {
            "srun": 'while [[ $1 == --* ]]; do shift; done; exec "$@"',
            "python": f'exec {sys.executable} "$@"',
            "ray": f'exec {BIN / "ray"} "$@"',
            "headrace": f'exec {" ".join(HEADRACE)} "$@"',
        }
        (folder / "bin").mkdir()
        for name, body in programs.items():
            program = folder / "bin" / name
            program.write_text(f"#!/bin/bash\n{body}\n")
            program.chmod(0o755)
        slurm = {"SLURM_JOB_ID": str(job_id), "SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "1"}
        path = f"{folder / 'bin'}:{environ['PATH']}"
        self._env = {**environ, **slurm, "PATH": path, "HEADRACE_BIN": str(folder / "bin")}
        self._folder = folder

    def start(self, *words: str) -> subprocess.Popen[bytes]:
        """Begin the job."""
        script = ["bash", str(ROOT / "scripts" / "cluster" / "slurm.sh"), *words]
        return subprocess.Popen(script, cwd=self._folder, env=self._env)


def test_the_slurm_script_trains_on_two_nodes_and_goes_on_after_a_signal(environ, tmp_path: Path) -> None:
    job = TwoNodes(tmp_path, environ, job_id=os.getpid())
    words = (*TINY, "train.steps=200")
    cut = job.start(*words, "run.dir=cut")
    run = tmp_path / "cut"
    wait_for(lambda: has_begun(run))
    cut.send_signal(signal.SIGTERM)
    assert cut.wait(300) == 3
    assert json.loads((run / "summary.json").read_text())["facts"]["num_ranks"] == 2
    assert job.start(*words, "run.dir=cut").wait(600) == 0  # the words of a job that is queued again
    assert len(losses(run)) == 200
    alone = [*HEADRACE, "train", *words, "cluster=inline", "cluster.num_workers=2", f"run.dir={tmp_path / 'alone'}"]
    subprocess.run(alone, env=environ, check=True, timeout=600)
    assert losses(run) == losses(tmp_path / "alone")  # two nodes, cut and resumed: the same bits


def test_a_wheel_in_a_fresh_environment_trains(environ, tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    source = tmp_path / "source"  # what git has, without what earlier builds left
    subprocess.run(["git", "-C", str(ROOT), "checkout-index", "--all", f"--prefix={source}/"], check=True)
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(tmp_path / "wheel"), str(source)]
    subprocess.run(build, check=True, timeout=600)
    (wheel,) = (tmp_path / "wheel").glob("headrace-*.whl")
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True, timeout=300)
    python = tmp_path / "venv" / "bin" / "python"
    # The wheel's requirements are those of the lock, which are installed here: the new environment finds them.
    (site,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    (found,) = {path for path in map(Path, sys.path) if path.name == "site-packages" and (path / "ray").is_dir()}
    (site / "installed.pth").write_text(f"{found}\n")
    subprocess.run(
        [str(python), "-m", "pip", "install", "-q", "--no-deps", "--force-reinstall", str(wheel)],
        check=True,
        timeout=300,
    )
    clean = {name: value for name, value in environ.items() if name != "PYTHONPATH"}
    where = "import headrace.platform.cli.main as m; print(m.__file__)"
    asked = subprocess.run(
        [str(python), "-c", where], env=clean, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert Path(asked.stdout.strip()).is_relative_to(site)
    program = tmp_path / "venv" / "bin" / "headrace"
    run = [str(program), "train", *TINY, "cluster.dashboard=false", "run.dir=run"]
    subprocess.run(run, env=clean, cwd=tmp_path, check=True, timeout=600)
    assert len(losses(tmp_path / "run")) == 3
