"""Dead runs leave nothing behind; living ones are not touched."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from headrace.storage.core.owners import this_process
from headrace.storage.tiers.host_slab import SHM, HostSlab
from headrace.storage.tiers.ssd_slab import SsdSlab
from headrace.storage.tiers.sweep import NAME, create_slab_file, note_slab, slab_name, sweep_folder, sweep_notes

OWNER = """
import sys, time
from headrace.storage.tiers.host_slab import HostSlab
from headrace.storage.tiers.ssd_slab import SsdSlab
slabs = [HostSlab(1 << 20, run_id="dead run"), SsdSlab(sys.argv[1], 1 << 20, run_id="dead run")]
print(slabs[0].path, slabs[1].path, flush=True)
time.sleep(60)
"""


def test_names_tell_the_owner() -> None:
    match = NAME.fullmatch(slab_name("runs/my run:1"))
    assert match is not None
    assert (int(match["pid"]), int(match["start"])) == (os.getpid(), this_process().start_ticks)
    assert slab_name("x") != slab_name("x")
    assert len(slab_name("x" * 500)) < 255


def test_slabs_of_a_killed_process_go_at_the_next_start(tmp_path: Path) -> None:
    dead_run, next_run = tmp_path / "dead/tiers", tmp_path / "next/tiers"
    owner = subprocess.Popen([sys.executable, "-c", OWNER, str(dead_run)], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    host_path, ssd_path = map(Path, owner.stdout.readline().split())
    with HostSlab(4096, run_id="next"), SsdSlab(next_run, 4096, run_id="next"):
        assert host_path.exists(), "a living run's slab was swept"
        assert ssd_path.exists()
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    assert host_path.exists(), "SIGKILL leaves the files"
    assert ssd_path.exists()
    with HostSlab(4096, run_id="next") as host, SsdSlab(next_run, 4096, run_id="next") as ssd:
        assert not host_path.exists()
        assert not ssd_path.exists(), "found through its note, in another run's folder"
        assert Path(host.path).exists()
        assert Path(ssd.path).exists()
    assert list((tmp_path / "cache/headrace/slabs").iterdir()) == [], "notes go with their files"
    assert not [path for path in SHM.glob("headrace-*") if f"-{os.getpid()}-" in path.name]


def dead_name() -> str:
    """A slab name of this host whose process never was."""
    return slab_name("gone").replace(this_process().tag, "999999999-1")


def test_only_what_nobody_owns_goes(tmp_path: Path) -> None:
    own = tmp_path / slab_name("own")
    os.close(create_slab_file(own))
    dead, locked, other, link = (tmp_path / dead_name() for _ in range(4))
    other = tmp_path / "headrace-notes.slab"
    for path in (dead, locked, other):
        path.write_bytes(b"x")
    link.symlink_to(other)
    with locked.open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert sweep_folder(tmp_path) == [dead]
    assert all(path.exists() for path in (own, locked, other, link))
    assert sweep_folder(tmp_path / "absent") == []


def test_a_file_of_another_host_goes_when_its_lock_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr("socket.gethostname", lambda: "elsewhere")
        held, free = tmp_path / slab_name("a"), tmp_path / slab_name("b")
        lock = create_slab_file(held)
        os.close(create_slab_file(free))
    assert sweep_folder(tmp_path) == [free]
    os.close(lock)
    assert sweep_folder(tmp_path) == [held]


def test_damaged_and_foreign_notes_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    precious = tmp_path / "precious.txt"
    precious.write_text("x")
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr("socket.gethostname", lambda: "elsewhere")
        foreign = note_slab(tmp_path / slab_name("a"))
    assert foreign is not None
    damaged = foreign.with_name("headrace-x.slab.json")
    damaged.write_text("{")
    aimed = note_slab(precious)
    assert aimed is not None
    aimed.write_text(aimed.read_text().replace(f'"pid": {os.getpid()}', '"pid": 999999999'))
    aimed.rename(aimed.with_name("precious.slab.json"))
    assert sweep_notes() == []
    assert precious.exists(), "a note can only remove slabs"
    assert foreign.exists()
    assert damaged.exists()


def test_no_cache_folder_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    with pytest.warns(UserWarning, match="XDG_CACHE_HOME"), SsdSlab(tmp_path / "t", 4096, run_id="x") as slab:
        assert Path(slab.path).exists()
