"""Shared fixtures. Markers gpu, multi_gpu and gds skip with a reason where the machine lacks the thing."""

from __future__ import annotations

import copy
import gc
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from headrace.helpers.forked_rank import ForkedRank
from headrace.platform.control import inline

# One thread per test process: two cores are shared by ranks, Ray and the test itself. Torch reads the variable as it is
# imported, which is over here: the variable is for the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)
# Read when a kernel is defined. Without a GPU the fused kernels run in Triton's interpreter, in fp32.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite tests/golden/*.txt; read the diff")


@pytest.fixture(scope="session", autouse=True)
def own_machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests neither read nor change what the user's cache keeps of this machine, and take no notice of its load."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0))
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def choices_are_composed_once() -> Iterator[None]:
    """Hydra composes the same choices from conf/ once in a test process: that is most of what a configuration costs."""
    try:
        from headrace.platform.config import load
    except ModuleNotFoundError:  # no Hydra: a machine for the tests that need a GPU
        yield
        return

    found: dict[tuple[str, ...], Any] = {}
    compose, folder = load.compose, load.CONF_DIR

    def compose_once(*, overrides: list[str], **rest: Any) -> Any:
        if folder != load.CONF_DIR or load.RECIPE.replace("/", "=") in overrides:
            return compose(overrides=overrides, **rest)  # files of the test's own
        key = tuple(overrides)
        if key not in found:
            found[key] = compose(overrides=overrides, **rest)
        return copy.deepcopy(found[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(load, "compose", compose_once)
        yield


@pytest.fixture(scope="session", autouse=True)
def plain_ranks_are_forked() -> Iterator[None]:
    """See ForkedRank."""
    stand_in = SimpleNamespace(Popen=ForkedRank, DEVNULL=subprocess.DEVNULL, TimeoutExpired=subprocess.TimeoutExpired)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inline, "subprocess", stand_in)
        yield


@pytest.fixture(scope="session")
def repo_root() -> Path:
    """The checkout."""
    return Path(__file__).resolve().parents[1]


@pytest.fixture
def mount_tmpfs(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Mounts small file systems, for as long as the test runs: a disk that is full, one that is read-only."""
    mounted: list[Path] = []

    def mount(options: str) -> Path:
        folder = tmp_path / f"disk{len(mounted)}"
        folder.mkdir()
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "headrace-test", str(folder)], capture_output=True, text=True
        )
        if done.returncode:
            pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    leave_out_long_forms(config, items)
    start_long_files_first(items)
    skip_what_the_machine_lacks(items)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[object]:
    """Importing tests leaves no garbage that is worth the search."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


def pytest_collection_finish() -> None:
    """Leaving a process group collects garbage: modules of torch and of tests need not be searched each time."""
    gc.collect()
    gc.freeze()


def leave_out_long_forms(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests marked `soak` run only where `-m` names soak: `-m gpu` would else take the tests of 2^31 entries along."""
    if "soak" in (config.option.markexpr or ""):
        return
    left_out = [item for item in items if item.get_closest_marker("soak")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("soak")]


def start_long_files_first(items: list[pytest.Item]) -> None:
    """Several test processes share the files out in this order, so that none is left with a long one at the end."""
    long_files = (
        *("tests/ray/", "test_on_fake_cuda.py", "test_predicted_decoder.py", "test_verify", "test_chunk_sweep.py"),
        *("tests/distributed/", "test_chunk_sparse.py", "test_layer_sweep.py", "test_session.py", "test_builds.py"),
        *("unit/remote/", "test_train.py", "test_mlflow_ui.py", "test_bucket_runs.py", "test_plan_remedies.py"),
        *("test_config_variants.py", "test_mini_model.py", "test_checkpoint.py", "test_gpu_headline.py"),
        *("test_hostile_runs.py", "test_ranks_killed.py"),
    )

    def place(item: pytest.Item) -> int:
        path = item.path.as_posix()
        return next((place for place, part in enumerate(long_files) if part in path), len(long_files))

    items.sort(key=place)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Files are shared out whole; all of tests/ray goes to one process, since each process has a Ray of its own."""
    from xdist.scheduler.loadfile import LoadFileScheduling

    class Files(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "tests/ray" if nodeid.startswith("tests/ray/") else super()._split_scope(nodeid)

    return Files(config, log) if config.getoption("dist") == "loadfile" else None


def skip_what_the_machine_lacks(items: list[pytest.Item]) -> None:
    wanted = {name for item in items for name in ("gpu", "multi_gpu", "gds") if item.get_closest_marker(name)}
    if not wanted:
        return
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    gds = num_gpus > 0 and Path("/proc/driver/nvidia-fs/stats").exists()
    missing = {
        "gpu": None if num_gpus >= 1 else "no CUDA device",
        "multi_gpu": None if num_gpus >= 2 else f"needs 2 CUDA devices, there are {num_gpus}",
        "gds": None if gds else "no GPUDirect Storage driver (nvidia-fs)",
    }
    for item in items:
        for name, reason in missing.items():
            if reason and item.get_closest_marker(name):
                item.add_marker(pytest.mark.skip(reason=reason))
