"""The GPU checks of tests/bench/PENDING.md, in two runs of 360 s that fit one short loan of a GPU.

    python scripts/gpu_checks.py OUT run=A       are the numbers right: facts, smoke, tiers, training, kernels, verify
    python scripts/gpu_checks.py OUT run=B       how fast is it: 7B at 32K, transformers beside it, copies, products
    python scripts/gpu_checks.py OUT rehearse=1  both on CPU with tiny shapes, without the packages of ABSENT

Writes OUT/A.json (how each part went) and OUT/A.tar.gz (logs, JUnit files, rows), both anew every 15 s and after each
part, and nothing else: whenever it is killed, what was finished is there. A part that fails or hangs costs its own
result; the seconds that a part leaves go to the next. Exit code 0 when every part passed.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from headrace.platform.children import Child  # noqa: E402

RUN_S, START_S, END_S = 360, 75, 10  # of a run; until the machine stands; to pack and to send
EVERY_S = 15.0
LOG_BYTES, RAW_BYTES = 512 * 1024, 15 * 1024**2  # of a file in the archive; of all of them before they are packed
REHEARSAL_PART_S = 120
ABSENT = ("ray", "hydra", "omegaconf", "mlflow", "kvikio", "nvidia.dali")
PYTHON = sys.executable
BENCH = [PYTHON, "-m", "headrace.platform.cli.main", "bench"]
PROFILE = [PYTHON, "-m", "headrace.platform.doctor.machine_profile"]
PYTEST = [PYTHON, "-m", "pytest", "-m", "gpu and not soak", "-v", "--tb=short", "-p", "no:cacheprovider"]
PYTEST += ["--session-timeout={soft}", "--timeout={soft}"]
FACTS = """\
nvidia-smi; uname -a; nproc; free -g; df -h /dev/shm /tmp; ulimit -l; cat /proc/driver/nvidia/version
cat /sys/kernel/mm/transparent_hugepage/enabled; "$0" -m pip list; true
"""
DEVICE = "import torch; print(torch.__version__); print(torch.cuda.get_device_properties(0))"
# Finds everything but the packages that need not be there.
ABSENCE = f"""\
import importlib.machinery, sys
class Finder(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name in {ABSENT} else super().find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(importlib.machinery.PathFinder)] = Finder
"""
MEMORY = ("unit/storage/test_transfer.py", "unit/storage/test_device_pages.py", "unit/workers/memory/test_meter.py")
KERNELS = [f"gpu/test_{name}.py" for name in ("block_kernels", "codecs", "loss", "streaming", "kernels")]


@dataclass(frozen=True)
class Part:
    """Commands that run at the same time, and the seconds that they have together.

    Args:
        commands: by name; {limit}, {soft} and {out} in a word stand for the seconds until the kill, for fewer in which
            a command may end by itself, and for a folder that comes back.
    """

    name: str
    budget_s: float
    commands: Mapping[str, Sequence[str]]


def parts(run: str, *, rehearse: bool = False) -> list[Part]:
    """The parts of run A or B, what matters most first."""

    def tests(name: str, budget_s: float, *files: str, more: str = "-n0") -> Part:
        """One pytest per file, so that a broken CUDA context costs one file; one in all where none has a context."""
        groups = {name: files} if rehearse else {Path(file).stem: (file,) for file in files}
        commands = {
            stem: [*PYTEST, more, f"--junitxml={{out}}/{stem}.xml", *(f"tests/{file}" for file in some)]
            for stem, some in groups.items()
        }
        return Part(name, budget_s, commands)

    def bench(name: str, budget_s: float, *words: str) -> Part:
        return Part(name, budget_s, {name: [*BENCH, *words, "limit_s={soft}", "out={out}"]})

    def rates(name: str, budget_s: float) -> Part:
        part = "host_memory" if rehearse else name
        return Part(name, budget_s, {name: [*PROFILE, part, "{out}", "{soft}"]})

    if run == "A":
        verify = ("unit/workers/verify/test_verify.py", "unit/platform/doctor/test_gpu_parts.py")
        others = ("unit/kernels/test_mini_model.py", "unit/workers/telemetry/test_gemm.py", "gpu/test_kernel_bench.py")
        facts = {"facts": ["sh", "-c", FACTS, PYTHON]}
        return [
            Part("facts", 10, facts if rehearse else {**facts, "device": [PYTHON, "-c", DEVICE]}),
            tests("smoke", 30, "gpu/test_smoke.py", more="-mnot soak"),
            tests("memory", 15, *MEMORY),
            tests("tiers", 30, "gpu/test_tiers_gpu.py"),  # alone: some of its tests compare times
            tests("training", 60, "gpu/test_train.py", "gpu/test_step_addresses.py"),
            tests("kernels", 80, *KERNELS, more="-n0" if rehearse else "-n3"),
            tests("verify", 45, *verify, *others),
        ]
    shape = ["models=tiny", "lengths=64", "device=cpu"] if rehearse else ["models=qwen2_5_7b", "lengths=32768"]
    case = ["gpu-headline", *shape, "steps=2", "case_limit_s={soft}", f"rows={ROOT / 'build/headline-rows'}"]
    host = ["device=cpu", "sizes=64K", "host_mib=1", "rounds=1"] if rehearse else ["device=cuda"]
    return [
        bench("7b_offload_host", 100, *case, "systems=headrace_offload_host"),
        bench("7b_transformers", 45, *case, "systems=transformers_checkpoint", "weights=bf16"),
        bench("7b_recompute", 70, *case, "systems=headrace_recompute"),
        bench("host_tier", 40, "tiers", "tiers=host", "overlap=false", *host),
        rates("copy", 10),
        rates("gemm", 10),
    ]


class Archive:
    """OUT/RUN.json and OUT/RUN.tar.gz: the parts so far, and a work folder that lies elsewhere."""

    def __init__(self, out: Path, run: str, work: Path) -> None:
        self.outcomes: list[dict[str, Any]] = []
        self._out, self._run, self._work = out, run, work
        self._lock = threading.Lock()

    def write(self) -> None:
        """Write both anew; a reader sees the old or the new ones, whole."""
        with self._lock:
            summary = json.dumps({"run": self._run, "parts": self.outcomes}, indent=1).encode()
            packed = io.BytesIO()
            with tarfile.open(fileobj=packed, mode="w:gz", compresslevel=3) as tar:
                for name, content in [("parts.json", summary), *self._contents()]:
                    info = tarfile.TarInfo(f"{self._run}/{name}")
                    info.size, info.mtime = len(content), int(time.time())
                    tar.addfile(info, io.BytesIO(content))
            for name, content in ((f"{self._run}.tar.gz", packed.getvalue()), (f"{self._run}.json", summary)):
                (self._out / f"{name}.new").write_bytes(content)
                os.replace(self._out / f"{name}.new", self._out / name)

    def _contents(self) -> Iterator[tuple[str, bytes]]:
        left = RAW_BYTES
        for path in sorted(path for path in self._work.rglob("*") if path.is_file()):
            try:
                content = path.read_bytes()
            except OSError:  # a part has moved or removed it just now
                continue
            if len(content) > LOG_BYTES:
                cut = f"\n[... {len(content) - LOG_BYTES} bytes left out ...]\n".encode()
                content = content[: LOG_BYTES // 4] + cut + content[-3 * LOG_BYTES // 4 :]
            left -= len(content)
            if left >= 0:
                yield str(path.relative_to(self._work)), content

    @contextlib.contextmanager
    def rewritten(self, every_s: float) -> Iterator[None]:
        """Write every so many seconds, beside the caller."""
        over = threading.Event()

        def keep_writing() -> None:
            while not over.wait(every_s):
                self.write()

        thread = threading.Thread(target=keep_writing)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()


def run_parts(found: Sequence[Part], archive: Archive, work: Path, *, each_s: float | None = None) -> bool:
    """Run them in turn, each until its budget and those before it are used up, or for `each_s`; whether all passed."""
    end_s = time.monotonic()
    for part in found:
        end_s += part.budget_s
        begin_s = time.monotonic()
        limit_s = each_s or max(end_s - begin_s, 1.0)
        (work / part.name).mkdir()
        failures = run_part(part, limit_s, work / part.name)
        took_s = time.monotonic() - begin_s
        archive.outcomes.append(
            {"part": part.name, "limit_s": round(limit_s, 1), "s": round(took_s, 1), "failures": failures}
        )
        archive.write()
        print(f"{part.name}: done in {took_s:.1f} of {limit_s:.0f} s", *failures.values(), sep="\n  ", flush=True)
    return not any(outcome["failures"] for outcome in archive.outcomes)


def run_part(part: Part, limit_s: float, out: Path) -> dict[str, str]:
    """Run the commands of one part at the same time; why those failed that did, with the lines that say most."""
    words = {"limit": f"{limit_s:.0f}", "soft": f"{max(limit_s - 10, limit_s / 2):.0f}", "out": str(out)}
    failures = {}
    with contextlib.ExitStack() as closing:
        children = {
            name: closing.enter_context(
                Child([fill(word, words) for word in command], limit_s=limit_s, log=out / f"{name}.log")
            )
            for name, command in part.commands.items()
        }
        for name, child in children.items():
            for _ in child.rows():
                pass
            if child.failure is not None:
                log = (out / f"{name}.log").read_text(errors="replace").splitlines()
                said = [line[:200] for line in log if line.startswith(("FAILED", "ERROR", "E  "))][:12]
                failures[name] = "\n    ".join([f"{name}: {child.failure}", *said])
    return failures


def fill(word: str, words: Mapping[str, str]) -> str:
    """The word with {limit}, {soft} and {out} filled in."""
    for key, value in words.items():
        word = word.replace(f"{{{key}}}", value)
    return word


def prepare_environment(work: Path, *, rehearse: bool) -> None:
    """Set what the children inherit: where headrace is, and no switch that would change what is measured."""
    for name in ("TRITON_INTERPRET", "TORCH_CUDNN_SDPA_AVOID_RECOMPILE"):
        os.environ.pop(name, None)
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    if rehearse:  # as a machine would be that has neither these packages nor a repository
        (work / "sitecustomize.py").write_text(ABSENCE)
        paths.insert(0, str(work))
        os.environ.update(GIT_DIR=os.devnull, PYTEST_ADDOPTS="-p no:hydra_pytest")
    os.environ.update(PYTHONUNBUFFERED="1", PYTHONPATH=os.pathsep.join(paths))
    os.chdir(ROOT)


def check_budgets(run: str) -> None:
    """Raises SystemExit where the parts of a run, the start and the end are more than the run has."""
    total_s = START_S + sum(part.budget_s for part in parts(run)) + END_S
    if total_s > RUN_S:
        raise SystemExit(f"run {run}: its parts, start and end sum up to {total_s:.0f} s, a run has {RUN_S} s")


def main(argv: list[str]) -> int:
    """Run A, B or the rehearsal of both; 0 when every part passed."""
    words = dict(word.split("=", 1) for word in argv[1:] if "=" in word)
    rehearse = words.pop("rehearse", "0") == "1"
    runs = ["A", "B"] if rehearse else [words.pop("run", "")]
    if not argv or "=" in argv[0] or words or not set(runs) <= {"A", "B"}:
        print(__doc__, file=sys.stderr)
        return 2
    out = Path(argv[0]).absolute()
    out.mkdir(parents=True, exist_ok=True)
    passed = True
    for run in runs:
        check_budgets(run)
        work = Path(tempfile.mkdtemp(prefix=f"headrace-gpu-{run}-"))
        try:
            prepare_environment(work, rehearse=rehearse)
            archive = Archive(out, run, work)
            with archive.rewritten(EVERY_S):
                passed &= run_parts(
                    parts(run, rehearse=rehearse), archive, work, each_s=REHEARSAL_PART_S if rehearse else None
                )
        finally:
            shutil.rmtree(work)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
