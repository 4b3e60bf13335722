"""Real file systems that break on demand: ext4 on a loop device. Needs root and mount(8), is skipped without."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

MIB = 1024**2


def command(*words: object) -> str:
    """Output of a command; the test is skipped where it is missing or refused."""
    try:
        done = subprocess.run([str(word) for word in words], capture_output=True, text=True, check=False, timeout=600)
    except FileNotFoundError as error:
        pytest.skip(f"{words[0]} is not installed: {error}")
    if done.returncode != 0:
        pytest.skip(f"`{' '.join(str(word) for word in words)}` was refused: {done.stderr.strip()}")
    return done.stdout.strip()


@dataclass
class LoopDrive:
    """A small ext4 whose drive is a file.

    Args:
        image: that file.
        device: /dev/loopN.
        folder: where it is mounted.
    """

    image: Path
    device: str
    folder: Path

    def fail_file_system(self) -> None:
        """What ext4 does when it meets an error: it turns read-only for good."""
        trigger = Path(f"/sys/fs/ext4/{Path(self.device).name}/trigger_fs_error")
        if not trigger.exists():
            pytest.skip(f"this kernel has no {trigger}")
        trigger.write_text("1")

    def lose_bytes(self) -> None:
        """The drive forgets all but its first MiB; reads beyond end in EIO."""
        with self.image.open("r+b") as file:
            file.truncate(MIB)

    def unmount_lazily(self) -> None:
        """Gone from the tree of files; open files stay."""
        command("umount", "-l", self.folder)


@pytest.fixture
def undo() -> Iterator[ExitStack]:
    """Undone in reverse order, also where a test or a later fixture fails."""
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def make_drive(undo: ExitStack, tmp_path: Path) -> Callable[..., LoopDrive]:
    """Make a drive of so many MiB, its image in a folder of choice."""
    count = iter(range(100))

    def make(num_mib: int, *, folder: Path = tmp_path) -> LoopDrive:
        name = f"drive{next(count)}"
        image, mounted = folder / f"{name}.img", tmp_path / name
        mounted.mkdir()
        with image.open("wb") as file:
            file.truncate(num_mib * MIB)
        # Nothing is left to be written later: what a test does to the drive meets nothing but the test's own transfers.
        command("mkfs.ext4", "-q", "-F", "-m", "0", "-E", "lazy_itable_init=0,lazy_journal_init=0,nodiscard", image)
        device = command("losetup", "--find", "--show", image)
        undo.callback(_detach, device, image)
        command("mount", "-o", "errors=remount-ro", device, mounted)
        undo.callback(_unmount, mounted)
        return LoopDrive(image, device, mounted)

    return make


@pytest.fixture
def make_tmpfs(undo: ExitStack, tmp_path: Path) -> Callable[[int], Path]:
    """Mount a file system in memory of so many MiB."""

    def make(num_mib: int) -> Path:
        folder = tmp_path / f"tmpfs{num_mib}"
        folder.mkdir()
        command("mount", "-t", "tmpfs", "-o", f"size={num_mib}m", "tmpfs", folder)
        undo.callback(_unmount, folder)
        return folder

    return make


def _unmount(folder: Path) -> None:
    if folder.is_mount():
        subprocess.run(["umount", "-l", str(folder)], check=True, timeout=600)


def _detach(device: str, image: Path) -> None:
    subprocess.run(["losetup", "-d", device], check=False, capture_output=True, timeout=600)
    # A device in use goes when its last user goes, which is soon.
    deadline_s = time.monotonic() + 600
    while str(image) in subprocess.run(["losetup", "-a"], capture_output=True, text=True, check=True).stdout:
        assert time.monotonic() < deadline_s, f"{device} is still attached to {image}"
        time.sleep(0.05)


@dataclass
class FuseMount:
    """A file system of one file, `slab`, whose server errs on demand; see fuse_drive.py for the modes."""

    slab: Path
    mode_file: Path
    server: subprocess.Popen[str]

    def set_mode(self, mode: str) -> None:
        """From the next call on."""
        fresh = self.mode_file.with_suffix(".new")
        fresh.write_text(mode)
        fresh.replace(self.mode_file)

    def vanish(self) -> None:
        """The server dies; the mount stays, without anybody behind it."""
        self.server.kill()
        self.server.wait(600)


@pytest.fixture
def fuse_mount(undo: ExitStack, tmp_path: Path) -> FuseMount:
    """32 MiB."""
    folder, mode_file = tmp_path / "fuse", tmp_path / "mode"
    folder.mkdir()
    mode_file.write_text("ok")
    server = subprocess.Popen(
        [sys.executable, Path(__file__).with_name("fuse_drive.py"), folder, str(32 * MIB), mode_file],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    undo.callback(_end, server, folder)
    assert server.stdout is not None
    said = server.stdout.readline().strip()
    if said != "mounted":
        pytest.skip(f"FUSE is not to be had here: {said or server.communicate()[0]}")
    return FuseMount(folder / "slab", mode_file, server)


def _end(server: subprocess.Popen[str], folder: Path) -> None:
    # First the server: a call that nobody answers would hold up everybody who looks at the mount.
    server.kill()
    server.communicate(timeout=600)
    with open("/proc/self/mounts") as mounts:
        mounted = str(folder) in mounts.read()
    if mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True, timeout=600)
