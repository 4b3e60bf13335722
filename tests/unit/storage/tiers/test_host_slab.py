"""The owner's side of host memory: which file, how its pages come, where they are, and refusals in words."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from headrace.storage.core.errors import MachineError
from headrace.storage.tiers import host_slab, touch
from headrace.storage.tiers.host_slab import HostSlab, choose_file
from headrace.storage.tiers.huge_pages import memfd_setting
from headrace.storage.tiers.memory_limits import SHM, MemoryLimit
from headrace.storage.tiers.numa import NumaNode, memory_nodes
from headrace.storage.tiers.sweep import create_slab_file, promised_bytes, slab_name

MIB = 1024**2
GIB = 1024**3
PAGE = 4096

WRITER = """
import mmap, os, sys
path, offset, num_bytes = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
fd = os.open(path, os.O_RDWR)
with mmap.mmap(fd, num_bytes, offset=offset) as view:
    assert view[:5] == b"hello", view[:5]
    view[:5] = b"world"
"""


@pytest.fixture
def mount_tmpfs(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a tmpfs with the given options, for as long as the test lasts."""
    mounted: list[Path] = []

    def mount(options: str) -> Path:
        folder = tmp_path / f"tmpfs{len(mounted)}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            pytest.skip(f"a tmpfs cannot be mounted here: {done.stderr.strip()}")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def on_old_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """madvise as before Linux 5.14."""

    def unknown(address: int, num_bytes: int) -> None:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(touch, "populate", unknown)


@pytest.mark.parametrize("kind", ["shm", "memfd"])
def test_another_process_sees_the_lease(kind: str, tmp_path: Path) -> None:
    shm = SHM if kind == "shm" else tmp_path / "absent"
    with HostSlab(4 * MIB, run_id="two", shm=shm) as slab:
        slab.lease("rank0", MIB)
        lease = slab.lease("rank1", MIB)
        with open(slab.path, "r+b") as file:
            file.seek(lease.offset_bytes)
            file.write(b"hello")
        command = [sys.executable, "-c", WRITER, lease.path, str(lease.offset_bytes), str(lease.num_bytes)]
        subprocess.run(command, check=True, timeout=60)
        found = Path(slab.path).read_bytes()
        assert found[MIB : MIB + 5] == b"world"
        assert not any(found[:MIB]), "the other lease is untouched"


@pytest.mark.parametrize("kernel", ["new", "old"])
@pytest.mark.parametrize("kind", ["shm", "memfd"])
def test_the_slab_is_resident_before_the_first_step(
    kind: str, kernel: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kernel == "old":
        on_old_kernel(monkeypatch)
    monkeypatch.setattr(touch, "PIECE_BYTES", MIB)
    with HostSlab(3 * MIB + 5, run_id="touch", shm=SHM if kind == "shm" else tmp_path / "absent") as slab:
        found = os.stat(slab.path)
        assert found.st_size == slab.num_bytes == 3 * MIB + PAGE
        assert found.st_blocks * 512 >= slab.num_bytes
        record = slab.record()
    assert ("MADV_POPULATE_WRITE" in record["touch_how"]) == (kernel == "new")
    assert record["num_threads"] == len(os.sched_getaffinity(0))
    assert record["touch_gib_per_s"] > 0
    assert record["paths"] == [slab.path]


def test_which_file_and_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_slab, "memfd_setting", lambda: "never")
    absent = choose_file(MIB, tmp_path / "absent")
    assert (absent.is_memfd, absent.why) == (True, f"a memfd: there is no {tmp_path / 'absent'}")
    fits = choose_file(MIB, tmp_path)
    assert (fits.is_memfd, fits.why) == (False, f"a file of {tmp_path}, which has room")
    with monkeypatch.context() as small:
        small.setattr(host_slab, "_free_bytes", lambda folder: MIB)
        found = choose_file(2 * MIB, tmp_path)
        assert found.is_memfd
        assert "0.00 GiB are free" in found.why
        assert not choose_file(MIB, tmp_path).is_memfd
    with monkeypatch.context() as closed:
        closed.setattr(os, "access", lambda path, mode: False)
        assert choose_file(MIB, tmp_path).why == f"a memfd: {tmp_path} is not writable"
    monkeypatch.setattr(host_slab, "memfd_setting", lambda: "advise")
    better = choose_file(MIB, tmp_path)
    assert (better.is_memfd, better.huge) == (True, "advise")
    assert "it gets huge pages (shmem_enabled: advise)" in better.why
    monkeypatch.setattr(host_slab, "mount_setting", lambda folder: "within_size")
    assert not choose_file(MIB, tmp_path).is_memfd, "no reason to leave the file system"


def test_a_small_shared_memory_file_system_gives_way_to_a_memfd(mount_tmpfs: Callable[[str], Path]) -> None:
    shm = mount_tmpfs("size=1m")
    with HostSlab(4 * MIB, run_id="x", shm=shm) as slab:
        assert slab.is_memfd
        assert f"are free in {shm}, 0.00 GiB wanted" in slab.why
        assert list(shm.iterdir()) == [], "what it promised is kept, and the file of holes is gone"


def test_too_little_memory_is_told_in_words(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    limit = MemoryLimit(MIB, "control group limit (/x/memory.max)")
    monkeypatch.setattr(host_slab, "available_memory", lambda shm, grows: limit)
    with pytest.raises(MachineError) as caught:
        HostSlab(1024 * MIB, run_id="x", shm=tmp_path)
    for part in ("host tier: 1.00 GiB wanted", "0.00 GiB there", "/x/memory.max", "tiers.host.budget_gib"):
        assert part in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_machine_whose_memory_grows_is_taken_at_its_word(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = host_slab.available_memory
    little = MemoryLimit(MIB, "free memory (MemAvailable)")
    monkeypatch.setattr(host_slab, "available_memory", lambda shm, grows: real(grows=True) if grows else little)
    with pytest.raises(MachineError, match=r"tiers\.host\.memory_grows=true"):
        HostSlab(4 * MIB, run_id="x", shm=tmp_path)
    with HostSlab(4 * MIB, run_id="x", shm=tmp_path, memory_grows=True) as slab:
        assert slab.num_bytes == 4 * MIB


def test_far_too_much_is_refused_at_once_and_nothing_is_touched(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(host_slab, "touch", lambda *_, **__: pytest.fail("pages were touched"))
    begin_s = time.perf_counter()
    with pytest.raises(MachineError, match=r"4294967296\.00 GiB wanted"):
        HostSlab(1 << 62, run_id="x", shm=tmp_path)
    assert time.perf_counter() - begin_s < 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kernel", ["new", "old"])
def test_a_file_system_that_fills_up_half_way_is_left_empty(
    kernel: str, mount_tmpfs: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    shm = mount_tmpfs("size=8m")
    if kernel == "old":
        on_old_kernel(monkeypatch)
    else:
        monkeypatch.setattr(os, "posix_fallocate", lambda *_: pytest.fail("a full file system was tried again"))
    monkeypatch.setattr(touch, "PIECE_BYTES", MIB)
    monkeypatch.setattr(host_slab, "_free_bytes", lambda folder: GIB)  # somebody else was quicker
    open_files = len(os.listdir("/proc/self/fd"))
    with pytest.raises(MachineError, match=r"No space left on device; lower tiers\.host\.budget_gib") as caught:
        HostSlab(16 * MIB, run_id="x", shm=shm)
    assert caught.value.__traceback__ is not None, "its frames keep the slab: it was closed, not collected"
    assert list(shm.iterdir()) == []
    space = os.statvfs(shm)
    assert space.f_bfree == space.f_blocks
    assert len(os.listdir("/proc/self/fd")) == open_files
    with HostSlab(8 * MIB, run_id="x", shm=shm) as slab:
        assert not slab.is_memfd


def test_a_limit_on_file_sizes_is_told_in_words() -> None:
    code = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from headrace.storage.core.errors import MachineError\n"
        "from headrace.storage.tiers.host_slab import HostSlab\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))\n"
        "try:\n    HostSlab(4 << 20, run_id='x')\n"
        "except MachineError as error:\n    print(error)\n"
        "assert not list(Path('/dev/shm').glob(f'*-{__import__(\"os\").getpid()}-*'))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert "ulimit -f" in done.stdout


@pytest.mark.parametrize("options", ["huge=advise", "huge=never"])
def test_huge_pages_come_where_the_mount_gives_them(options: str, mount_tmpfs: Callable[[str], Path]) -> None:
    if memfd_setting() in ("absent", "deny", "force"):
        pytest.skip("the kernel has no choice of huge pages for files in memory")
    shm = mount_tmpfs(f"size=64m,{options}")
    # Two nodes make two mappings of it, whose huge pages both count.
    nodes = [NumaNode(node.node, node.cores) for node in (*memory_nodes(), *memory_nodes())][:2]
    with HostSlab(16 * MIB, run_id="x", shm=shm, nodes=nodes) as slab:
        assert not slab.is_memfd
        record = slab.record()
    assert record["huge_setting"] == options.removeprefix("huge=")
    if options == "huge=never":
        assert record["huge_bytes"] == 0
    else:
        assert record["huge_bytes"] in range(2 * MIB, 16 * MIB + 1), "fragmented memory may give fewer"


def test_what_others_have_promised_is_not_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / slab_name("other")
    fd = create_slab_file(other)
    os.truncate(fd, 1 << 42)
    with pytest.raises(MachineError, match=rf"0\.00 GiB there by .* less 4096\.00 GiB promised to slabs in {tmp_path}"):
        HostSlab(PAGE, run_id="x", shm=tmp_path)
    os.truncate(fd, 8 * MIB)
    monkeypatch.setattr(host_slab, "_free_bytes", lambda folder: 9 * MIB)
    assert choose_file(2 * MIB, tmp_path).is_memfd, "the room on the file system is promised too"
    os.posix_fallocate(fd, 0, 8 * MIB)
    assert not choose_file(2 * MIB, tmp_path).is_memfd, "what is touched is no longer promised"
    os.close(fd)


def test_a_memfd_promises_until_it_is_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_slab, "memfd_setting", lambda: "advise")
    monkeypatch.setattr(touch, "PIECE_BYTES", MIB)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})
    promised: list[int] = []

    def watched(*args: Any, after_piece: Callable[[], None], **kwargs: Any) -> touch.Touched:
        def then() -> None:
            after_piece()
            promised.append(promised_bytes(tmp_path))

        promised.append(promised_bytes(tmp_path))
        return touch.touch(*args, after_piece=then, **kwargs)

    monkeypatch.setattr(host_slab, "touch", watched)
    with HostSlab(4 * MIB, run_id="x", shm=tmp_path) as slab:
        assert slab.is_memfd
        assert promised == [4 * MIB, 3 * MIB, 2 * MIB, MIB, 0]
        assert list(tmp_path.iterdir()) == []


TWO_NODES = (NumaNode(0, frozenset(os.sched_getaffinity(0))), NumaNode(1, frozenset()))


def test_leases_lie_in_the_region_of_their_node(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(touch, "prefer_node", lambda address, num_bytes, node: asked.append((num_bytes, node)))
    with HostSlab(4 * MIB, run_id="x", nodes=TWO_NODES) as slab:
        assert asked == [(2 * MIB, 0), (2 * MIB, 1)]
        far = slab.lease("rank0", MIB, numa_node=1)
        near = slab.lease("rank1", MIB, numa_node=0)
        anywhere = slab.lease("rank2", MIB, numa_node=7)
        assert (far.offset_bytes, near.offset_bytes) == (2 * MIB, 0)
        assert anywhere.num_bytes == MIB
        assert "one part on each of the nodes 0, 1, preferred" in slab.numa_why
        regions = slab.record()["numa_regions"]
    assert [(region["node"], region["begin"], region["end"]) for region in regions] == [
        (0, 0, 2 * MIB),
        (1, 2 * MIB, 4 * MIB),
    ]


def test_the_record_says_where_pages_are_and_not_where_they_were_wanted() -> None:
    there = {node.node for node in memory_nodes()}
    if there != {0}:
        pytest.skip(f"needs a machine whose only node with memory is 0; here {sorted(there)}")
    with HostSlab(4 * MIB, run_id="x", nodes=TWO_NODES) as slab:
        assert "the kernel refused (Invalid argument)" in slab.numa_why, "there is no node 1"
        assert slab.lease("rank0", MIB, numa_node=1).numa_node == 0
        assert [set(region["sampled_pages"]) for region in slab.record()["numa_regions"]] == [{0}, {0}]
    with HostSlab(MIB, run_id="x") as slab:
        assert slab.numa_why == "nothing is bound: the slab is on 1 node(s) with memory"
        assert slab.lease("rank0", MIB).numa_node == 0
        assert slab.record()["numa_regions"] == []


def test_every_node_of_this_machine_gives_its_part() -> None:
    nodes = memory_nodes()
    if len(nodes) < 2:
        pytest.skip(f"needs several NUMA nodes with memory; here {len(nodes)}")
    with HostSlab(64 * MIB * len(nodes), run_id="x") as slab:
        assert [set(region["sampled_pages"]) for region in slab.record()["numa_regions"]] == [{n.node} for n in nodes]
        for node in reversed(nodes):
            assert slab.lease(f"rank{node.node}", 64 * MIB, numa_node=node.node).numa_node == node.node


def test_a_kernel_that_does_not_tell_is_no_reason_to_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: int) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr("headrace.storage.tiers.numa._call", refused)
    with HostSlab(4 * MIB, run_id="x", nodes=TWO_NODES) as slab:
        assert "the kernel refused (Operation not permitted)" in slab.numa_why
        assert "CAP_SYS_NICE" in slab.numa_why
        lease = slab.lease("rank0", MIB, numa_node=1)
        assert (lease.offset_bytes, lease.numa_node) == (2 * MIB, None)
        assert slab.record()["numa_regions"][0]["sampled_pages"] == {}


def test_threads_touch_on_cores_of_the_node() -> None:
    cores = sorted(os.sched_getaffinity(0))
    nodes = [NumaNode(0, frozenset(cores[:1])), NumaNode(1, frozenset(cores[-1:])), NumaNode(2, frozenset())]
    regions = host_slab.cut(3 * PAGE, nodes, PAGE)
    seen: dict[int, set[int]] = {}
    num_threads = touch._on_all_cores(3 * PAGE, regions, lambda begin, _: seen.update({begin: os.sched_getaffinity(0)}))
    assert seen == {0: set(cores[:1]), PAGE: set(cores[-1:]), 2 * PAGE: set(cores)}
    assert num_threads == 2 + len(cores)
    assert os.sched_getaffinity(0) == set(cores), "the caller's own thread is left alone"
