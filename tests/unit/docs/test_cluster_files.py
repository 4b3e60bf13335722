"""The Slurm script, the RayJob manifest and the Dockerfile, without Slurm, Kubernetes and an image builder.

What they run is planned, what they name is there, and the script starts and stops the right programs.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

from headrace.platform.cli.main import main
from headrace.platform.config.load import load_run_config
from headrace.platform.control.ray_env import OBJECT_STORE_BYTES

CLUSTER = Path(__file__).resolve().parents[3] / "scripts" / "cluster"
ROOT = CLUSTER.parents[1]


@pytest.fixture(scope="module")
def job() -> Mapping[str, Any]:
    """The specification of the RayJob."""
    return yaml.safe_load((CLUSTER / "rayjob.yaml").read_text())["spec"]


def test_the_ray_job_plans_for_the_pods_that_it_starts(
    job: Mapping[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program, verb, *words = shlex.split(job["entrypoint"])
    assert (program, verb) == ("headrace", "train")
    words = [word for word in words if not word.startswith(("run.dir=", "tiers.ssd.path="))]  # folders of the pods
    assert main(["plan", *words]) == 0
    cluster = load_run_config(words).config.cluster
    groups = [job["rayClusterSpec"]["headGroupSpec"], *job["rayClusterSpec"]["workerGroupSpecs"]]
    assert cluster.num_nodes == sum(group.get("replicas", 1) for group in groups)
    for group in groups:
        assert int(group["rayStartParams"]["object-store-memory"]) == OBJECT_STORE_BYTES
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        resources = container["resources"]
        assert resources["limits"] == resources["requests"]
        assert int(resources["limits"]["nvidia.com/gpu"]) == cluster.gpus_per_node
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert mounts.keys() == {volume["name"] for volume in pod["volumes"]}
        for key in ("run.dir", "tiers.ssd.path"):
            (value,) = re.findall(rf"{re.escape(key)}=(\S+)", job["entrypoint"])
            assert any(Path(value).is_relative_to(folder) for folder in mounts.values()), key


def test_the_ray_job_needs_a_token(job: Mapping[str, Any]) -> None:
    assert job["rayClusterSpec"]["authOptions"] == {"mode": "token"}
    locked = dict(re.findall(r"^(\w+)==(\S+)", (ROOT / "requirements.lock").read_text(), flags=re.MULTILINE))
    assert job["rayClusterSpec"]["rayVersion"] == locked["ray"]


def test_the_dockerfile_copies_what_is_there_and_runs_the_set_up() -> None:
    text = (CLUSTER / "Dockerfile").read_text().replace("\\\n", " ")
    steps = [line.split(maxsplit=1) for line in text.splitlines() if line and not line.startswith("#")]
    assert [word for word, _ in steps] == ["FROM", "RUN", "WORKDIR", "COPY", "RUN", "ARG", "ENV", "WORKDIR", "CMD"]
    for name in re.findall(r"\b[\w/-]+\.(?:sh|lock)\b", text):
        assert (ROOT / name).is_file(), name
    ignored = (CLUSTER / "Dockerfile.dockerignore").read_text().split()
    assert {".git", ".venv", "runs"} <= set(ignored)
    assert not {"headrace", "requirements.lock", "scripts", "conf"} & set(ignored)


class SlurmJob:
    """scripts/cluster/slurm.sh in a folder of its own, with programs that only write down their words."""

    def __init__(self, folder: Path, headrace: str) -> None:
        self.folder, self.log = folder, folder / "calls"
        self.log.touch()
        joined = f"while (( $(grep -c ^ray {self.log}) < $2 )); do sleep 0.02; done"
        programs = {
            "ray": 'say ray "$@" "token=$RAY_AUTH_TOKEN"; exec sleep 600',
            "srun": 'say srun "$@"; while [[ $1 == --* ]]; do shift; done; exec "$@"',
            "python": f'[[ $1 == - ]] || exec {sys.executable} "$@"; cat > /dev/null; {joined}; say wait "$2"',
            "headrace": f'say headrace "$@" "at=$RAY_ADDRESS"; {headrace}',
        }
        for name, body in programs.items():
            program = folder / "bin" / name
            program.parent.mkdir(exist_ok=True)
            program.write_text(f'#!/bin/bash\nsay() {{ echo "$*" >> {self.log}; }}\n{body}\n')
            program.chmod(0o755)

    def start(self, *words: str, nodes: int = 2) -> subprocess.Popen[str]:
        """Begin the job."""
        slurm = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NUM_NODES": str(nodes), "SLURM_GPUS_ON_NODE": "8"}
        path = f"{self.folder / 'bin'}:{os.environ['PATH']}"
        env = {**os.environ, **slurm, "PATH": path, "HEADRACE_BIN": str(self.folder / "bin"), "PYTHONPATH": str(ROOT)}
        script = ["bash", str(CLUSTER / "slurm.sh"), *words]
        return subprocess.Popen(script, cwd=self.folder, env=env, text=True, start_new_session=True)

    def calls(self) -> dict[str, list[str]]:
        """Words of each program, by its name; of several calls of one the words follow each other."""
        found: dict[str, list[str]] = {}
        for line in self.log.read_text().splitlines():
            name, *words = line.split()
            found.setdefault(name, []).extend(words)
        return found


def value_of(words: list[str], name: str) -> set[str]:
    return {word.partition("=")[2] for word in words if word.startswith(f"{name}=")}


def nothing_is_left(job: subprocess.Popen[str]) -> None:
    """Neither Ray runs any more. What the programs themselves had just called, mkdir or sleep, ends soon after them."""
    until_s = time.monotonic() + 300
    with suppress(ProcessLookupError):
        while True:
            os.killpg(job.pid, 0)
            assert time.monotonic() < until_s
            time.sleep(0.05)


def test_the_slurm_script_starts_ray_on_all_nodes_and_trains(tmp_path: Path) -> None:
    job = SlurmJob(tmp_path, "exit 0")
    assert job.start("train.steps=3", "memory=keep").wait(600) == 0
    calls = job.calls()
    (address,) = value_of(calls["headrace"], "at")
    assert {address, *value_of(calls["ray"], "--address")} == {address}
    assert address.endswith(":24711")
    (token,) = value_of(calls["ray"], "token")  # one for the head and the other node
    assert len(token) == 64
    assert calls["ray"].count("start") == 2
    assert calls["srun"][:2] == ["--nodes=1", "--ntasks=1"]
    assert calls["wait"] == ["2"]
    numbers = ["cluster.num_nodes=2", "cluster.gpus_per_node=8", "run.dir=runs/slurm-4711"]
    assert calls["headrace"] == ["train", "train.steps=3", "memory=keep", *numbers, f"at={address}"]


def test_the_ray_of_a_node_that_ends_is_started_again(tmp_path: Path) -> None:
    job = SlurmJob(tmp_path, f"while (( $(grep -c ^ray {tmp_path / 'calls'}) < 3 )); do sleep 0.05; done")
    ray = tmp_path / "bin" / "ray"
    once = f"[[ $* == *--address=* ]] && mkdir {tmp_path / 'ended'} 2>/dev/null && exit 1"
    ray.write_text(ray.read_text().replace("exec sleep", f"{once}\nexec sleep"))
    process = job.start()
    assert process.wait(600) == 0
    assert job.calls()["ray"].count("start") == 3
    nothing_is_left(process)


def test_on_one_node_the_slurm_script_needs_no_other(tmp_path: Path) -> None:
    job = SlurmJob(tmp_path, "exit 1")
    assert job.start(nodes=1).wait(600) == 1  # the driver's exit code is the job's
    assert "srun" not in job.calls()


def test_a_job_that_slurm_queues_again_resumes(tmp_path: Path) -> None:
    job = SlurmJob(tmp_path, "exit 0")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.yaml").touch()
    assert job.start("run.dir=mine", "train.steps=3").wait(600) == 0
    assert job.calls()["headrace"][:-1] == ["train", "--resume", "mine"]


def test_a_signal_to_the_slurm_script_lets_the_driver_save(tmp_path: Path) -> None:
    saving = "trap 'say saving; sleep 0.5; say saved; exit 3' TERM; say ready; while true; do sleep 0.05; done"
    job = SlurmJob(tmp_path, saving)
    process = job.start()
    until_s = time.monotonic() + 600
    while "ready" not in job.calls():
        assert time.monotonic() < until_s
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(600) == 3
    assert "saved" in job.calls()
    nothing_is_left(process)
