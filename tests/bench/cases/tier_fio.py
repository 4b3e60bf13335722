"""What the drive can do, by fio at its best: the same file, block size, queue depth and O_DIRECT as ours."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass

from headrace.bench.tier_rounds import Pass
from headrace.storage.core.errors import InputError, MachineError
from headrace.storage.core.records import Direction

REMEDY = "apt-get install fio, or scripts/pack-fio on a machine that has it and fio=FOLDER/fio here"
LIMIT_S = 120.0
ENGINES = ("io_uring", "libaio", "psync")


@dataclass(frozen=True)
class FileRange:
    """A part of a file, in bytes, and whether it is opened with O_DIRECT."""

    path: str
    offset_bytes: int
    num_bytes: int
    direct: bool


@dataclass(frozen=True)
class Setting:
    """The settings with which fio moves bytes.

    Args:
        engine: io_uring or libaio, which keep the queue filled from one thread; psync: a thread per part in flight.
        huge: buffers in reserved huge pages; a machine that has none reserved refuses.
    """

    engine: str
    huge: bool

    def __str__(self) -> str:
        """For the row."""
        return f"{self.engine}, huge pages" if self.huge else self.engine


class Fio:
    """A fio that runs here. The drive's rate is the best of its settings, found anew for every kind of pass.

    Args:
        settings: to try; one that fails here is left out.
    """

    def __init__(self, path: str, version: str, settings: Sequence[Setting]) -> None:
        self.path, self.version, self.settings = path, version, tuple(settings)
        self.chosen: dict[tuple[Direction, int], Setting] = {}

    def move(self, where: FileRange, direction: Direction, block_bytes: int, queue_depth: int) -> Pass:
        """Write or read the range once, in order; its blocks are allocated already and stay so.

        The time is that of fio's I/O alone, without its start. The first pass of a direction and a block size tries all
        settings, each on the whole range.

        Raises:
            MachineError: fio failed with every setting, or moved another number of bytes.
        """
        key = direction, block_bytes
        if key not in self.chosen:
            self.chosen[key] = self._fastest(where, direction, block_bytes, queue_depth)
        return self._run(self.chosen[key], where, direction, block_bytes, queue_depth)

    def setting_of(self, direction: Direction, block_bytes: int) -> str:
        """The setting that was the fastest, in words; empty before the first pass."""
        return str(self.chosen.get((direction, block_bytes), ""))

    def _fastest(self, where: FileRange, direction: Direction, block_bytes: int, queue_depth: int) -> Setting:
        rates: dict[Setting, float] = {}
        failures: list[MachineError] = []
        # What is tried first may pay for blocks that were never written: it has a second turn.
        for setting in (*self.settings, self.settings[0]):
            try:
                done = self._run(setting, where, direction, block_bytes, queue_depth)
                rates[setting] = max(done.gbps, rates.get(setting, 0.0))
            except MachineError as error:
                failures.append(error)
        if not rates:
            raise failures[0]
        return max(rates, key=lambda setting: rates[setting])

    def _run(
        self, setting: Setting, where: FileRange, direction: Direction, block_bytes: int, queue_depth: int
    ) -> Pass:
        num_blocks = where.num_bytes // block_bytes
        command = [self.path, *_words(setting, where, direction, block_bytes, min(queue_depth, num_blocks))]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=LIMIT_S, check=False, cwd=tempfile.gettempdir()
            )
        except subprocess.TimeoutExpired as error:
            raise MachineError(f"fio did not end within {LIMIT_S:.0f} s: {' '.join(command)}") from error
        if done.returncode != 0:
            raise MachineError(f"fio ended with {done.returncode}: {(done.stderr or done.stdout)[-500:].strip()}")
        return read_answer(done.stdout, direction, num_blocks * block_bytes)


def find_fio(path: str) -> Fio:
    """fio at `path`, or the one of PATH where that is empty.

    Raises:
        InputError: `path` is no program. MachineError: there is no fio, or it does not run.
    """
    found = shutil.which(path or "fio")
    if found is None and path:
        raise InputError(f"fio={path}: no program there; {REMEDY}")
    if found is None:
        raise MachineError(f"no fio on PATH, so the drive's own rate is not known: {REMEDY}")
    found = os.path.abspath(found)
    version, engines = (_ask(found, flag) for flag in ("--version", "--enghelp"))
    there = [engine for engine in ENGINES if engine in engines.split()]
    return Fio(found, version.strip(), [Setting(engine, huge) for engine in there for huge in (False, True)])


def read_answer(text: str, direction: Direction, num_bytes: int) -> Pass:
    """The pass in fio's JSON.

    Raises:
        MachineError: it is not fio's JSON, or tells of other bytes than were asked for.
    """
    try:
        # fio prints notes in front of its JSON.
        job = json.loads(text[text.index("{") :])["jobs"][0]
        side = job["write" if direction is Direction.store else "read"]
        moved, wall_s = int(side["io_bytes"]), float(side["runtime"]) / 1e3
        cpu_s = (float(job["usr_cpu"]) + float(job["sys_cpu"])) / 100.0 * float(job["job_runtime"]) / 1e3
    except (ValueError, KeyError, IndexError) as error:
        raise MachineError(f"fio answered what is not its JSON: {text[:200]!r}") from error
    if moved != num_bytes or wall_s <= 0.0:
        raise MachineError(f"fio moved {moved} bytes in {wall_s} s where {num_bytes} were asked for")
    return Pass(moved, wall_s, cpu_s)


def _words(setting: Setting, where: FileRange, direction: Direction, block_bytes: int, depth: int) -> list[str]:
    size = where.num_bytes // block_bytes * block_bytes
    words = [
        "--name=tiers",
        "--filename=" + where.path.replace(":", "\\:"),
        f"--rw={'write' if direction is Direction.store else 'read'}",
        f"--bs={block_bytes}",
        f"--direct={int(where.direct)}",
        f"--ioengine={setting.engine}",
        "--thread=1",
        # Pages of ours that are left in the page cache must stay to be seen.
        "--invalidate=0",
        # Nothing but bytes and time is asked for, and a start that calibrates clocks takes longer than the pass.
        "--gtod_reduce=1",
        "--clocksource=clock_gettime",
        "--disk_util=0",
        "--output-format=json",
    ]
    if setting.huge:
        words += ["--iomem=mmaphuge", "--hugepage-size=2m"]
    if setting.engine != "psync":
        return [*words, f"--iodepth={depth}", f"--offset={where.offset_bytes}", f"--size={size}"]
    num_blocks = size // block_bytes
    # Every thread has a stretch of its own, and all together the whole range.
    depth = next(jobs for jobs in range(depth, 0, -1) if num_blocks % jobs == 0)
    per_job = num_blocks // depth * block_bytes
    rest = [f"--numjobs={depth}", "--group_reporting", f"--offset={where.offset_bytes}", f"--size={per_job}"]
    return [*words, *rest, f"--offset_increment={per_job}"]


def _ask(path: str, flag: str) -> str:
    try:
        done = subprocess.run([path, flag], capture_output=True, text=True, timeout=LIMIT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise MachineError(f"{path} {flag} does not run: {error}; {REMEDY}") from error
    if done.returncode != 0:
        raise MachineError(f"{path} {flag} ended with {done.returncode}: {done.stderr[-300:].strip()}; {REMEDY}")
    return done.stdout
