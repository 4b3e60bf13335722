"""Nodes of machines that are not there, and the real kernel's word about the one that is."""

from __future__ import annotations

import ctypes
import itertools
import mmap
import os
from collections import Counter
from pathlib import Path

import pytest

from headrace.storage.tiers import numa
from headrace.storage.tiers.huge_pages import memfd_setting, mount_setting, populate
from headrace.storage.tiers.numa import NumaNode, cut, memory_nodes, nodes_of, parse_list, prefer_node

MIB = 1024**2
PAGE = mmap.PAGESIZE


def machine(folder: Path, cpulists: dict[int, str], *, has_memory: str, mems: str, cpus: str) -> tuple[Path, Path]:
    sys, proc = folder / "sys", folder / "proc"
    for node, cpulist in cpulists.items():
        path = sys / f"devices/system/node/node{node}"
        path.mkdir(parents=True)
        (path / "cpulist").write_text(cpulist + "\n")
    (sys / "devices/system/node/has_memory").write_text(has_memory + "\n")
    (proc / "self").mkdir(parents=True)
    (proc / "self/status").write_text(f"Name:\tx:y\nCpus_allowed_list:\t{cpus}\nMems_allowed_list:\t{mems}\n")
    return sys, proc


def test_lists_of_the_kernel() -> None:
    assert parse_list("0-3,8,10-11\n") == {0, 1, 2, 3, 8, 10, 11}
    assert parse_list("\n") == frozenset()


def test_only_nodes_with_memory_that_is_allowed(tmp_path: Path) -> None:
    cpulists = {0: "0-3", 1: "4-7", 2: "", 10: "8-11"}
    sys, proc = machine(tmp_path, cpulists, has_memory="0,2,10", mems="0-9", cpus="1-5")
    # Node 1 has no memory, node 10 is not ours, node 2 has memory alone (CXL, HBM).
    assert memory_nodes(sys=sys, proc=proc) == (NumaNode(0, frozenset({1, 2, 3})), NumaNode(2, frozenset()))
    assert numa.cores_by_node(sys=sys)[10] == {8, 9, 10, 11}
    assert memory_nodes(sys=tmp_path / "absent", proc=proc) == ()


@pytest.mark.parametrize(("num_nodes", "pages"), [(2, 7), (4, 8), (4, 1023), (3, 3)])
def test_regions_are_equal_and_cover_the_slab(num_nodes: int, pages: int) -> None:
    nodes = [NumaNode(2 * i, frozenset()) for i in range(num_nodes)]
    regions = cut(pages * PAGE, nodes, PAGE)
    assert [region.node for region in regions] == nodes
    assert regions[0].begin == 0
    assert regions[-1].end == pages * PAGE
    assert all(left.end == right.begin for left, right in itertools.pairwise(regions))
    sizes = [(region.end - region.begin) // PAGE for region in regions]
    assert all(region.begin % PAGE == 0 for region in regions)
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) >= 1


def test_nothing_is_cut_where_there_is_no_choice() -> None:
    one, two = NumaNode(0, frozenset()), NumaNode(1, frozenset())
    assert cut(MIB, [], PAGE) == ()
    assert cut(MIB, [one], PAGE) == ()
    assert cut(PAGE, [one, two], PAGE) == ()
    assert cut(0, [one, two], PAGE) == ()


@pytest.fixture
def node() -> int:
    """A node whose memory this process may really ask for."""
    nodes = memory_nodes()
    if not nodes:
        pytest.skip("the kernel names no NUMA node")
    with mmap.mmap(-1, PAGE) as memory:
        start = ctypes.c_char.from_buffer(memory)
        try:
            prefer_node(ctypes.addressof(start), PAGE, nodes[-1].node)
        except PermissionError:
            pytest.skip("mbind is not permitted here")
        finally:
            del start
    return nodes[-1].node


def test_the_kernel_takes_the_wish_and_tells_where_pages_are(node: int) -> None:
    fd = os.memfd_create("numa")
    os.truncate(fd, 4 * MIB)
    with mmap.mmap(fd, 4 * MIB) as memory:
        start = ctypes.c_char.from_buffer(memory)
        address = ctypes.addressof(start)
        prefer_node(address + MIB, 2 * MIB, node)
        policies = {
            int(words[0], 16): words[1]
            for words in (line.split() for line in Path("/proc/self/numa_maps").read_text().splitlines())
        }
        populate(address, 4 * MIB)
        del start
    assert policies[address + MIB].startswith("prefer")
    assert policies[address + MIB].endswith(f":{node}")
    assert policies[address + 3 * MIB] == "default"
    assert nodes_of(fd, MIB, 3 * MIB) == Counter({node: numa.SAMPLES})
    assert nodes_of(fd, MIB, MIB + 3 * PAGE) == Counter({node: 3})
    assert nodes_of(fd, 0, 0) == Counter()
    os.close(fd)


def test_a_node_that_is_not_there_is_refused(node: int) -> None:
    absent = max(numa.cores_by_node()) + 1
    for number in (absent, 1000):
        with mmap.mmap(-1, PAGE) as memory:
            start = ctypes.c_char.from_buffer(memory)
            with pytest.raises(OSError, match="Invalid argument"):
                prefer_node(ctypes.addressof(start), PAGE, number)
            del start


def test_a_machine_whose_numbers_are_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    with pytest.raises(OSError, match="riscv64"):
        prefer_node(0, PAGE, 0)


def settings(folder: Path, overall: str, own: str | None) -> Path:
    path = folder / "kernel/mm/transparent_hugepage"
    path.mkdir(parents=True)
    words = "always within_size advise never deny force"
    (path / "shmem_enabled").write_text(words.replace(overall, f"[{overall}]"))
    (path / "hpage_pmd_size").write_text("2097152\n")
    if own is not None:
        (path / "hugepages-2048kB").mkdir()
        (path / "hugepages-2048kB/shmem_enabled").write_text(
            f"always inherit {words}".replace(f" {own} ", f" [{own}] ")
        )
    return folder


@pytest.mark.parametrize(
    ("overall", "own", "memfd"),
    [
        ("advise", None, "advise"),
        ("never", "inherit", "never"),
        ("always", "inherit", "always"),
        ("never", "advise", "advise"),
        ("advise", "never", "never"),
        ("deny", "advise", "deny"),
    ],
)
def test_huge_pages_of_memfds(overall: str, own: str | None, memfd: str, tmp_path: Path) -> None:
    assert memfd_setting(sys=settings(tmp_path, overall, own)) == memfd


def test_huge_pages_of_mounts(tmp_path: Path) -> None:
    sys, proc = settings(tmp_path / "sys", "never", None), tmp_path / "proc"
    (proc / "self").mkdir(parents=True)
    (proc / "self/mounts").write_text(
        "tmpfs /a tmpfs rw,size=4k,huge=advise 0 0\ntmpfs /b tmpfs rw 0 0\ndisk /c ext4 rw 0 0\n"
        "tmpfs /d tmpfs rw,huge=always 0 0\ntmpfs /d tmpfs rw 0 0\n"
    )
    found = {name: mount_setting(Path(name), sys=sys, proc=proc) for name in ("/a", "/b", "/c", "/d", "/e")}
    assert found == {"/a": "advise", "/b": "never", "/c": "never", "/d": "never", "/e": "never"}
    assert mount_setting(Path("/a"), sys=settings(tmp_path / "deny", "deny", None), proc=proc) == "deny"
    assert mount_setting(Path("/a"), sys=tmp_path / "none", proc=proc) == "absent"
    assert memfd_setting(sys=tmp_path / "none") == "absent"
