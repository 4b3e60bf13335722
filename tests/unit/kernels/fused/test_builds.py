"""Every fused kernel compiles for Ampere and Hopper, without a GPU, within their shared memory and without spills."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
from headrace.helpers.builds import Build, Compiled, Failed, complaint, for_dtypes

MODULE = "headrace.helpers.kernel_builds"
# Compiled as the others are, in a module of its own: each has the fault that its name says.
FAULTY = """
import triton
import triton.language as tl
from headrace.helpers import builds

@triton.jit
def spills(x_ptr, BLOCK: tl.constexpr):
    places = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + places)
    tl.store(x_ptr + places, x / tl.sum(x, axis=0))

@triton.jit
def shares(a_ptr, b_ptr, out_ptr, depth, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    rows, places = tl.arange(0, ROWS), tl.arange(0, BLOCK)
    total = tl.zeros((ROWS, ROWS), tl.float32)
    for begin in range(0, depth, BLOCK):
        a = tl.load(a_ptr + rows[:, None] * depth + begin + places[None, :])
        b = tl.load(b_ptr + (begin + places[:, None]) * ROWS + rows[None, :])
        total += tl.dot(a, b)
    tl.store(out_ptr + rows[:, None] * ROWS + rows[None, :], total)

arguments = {"a_ptr": "*bf16", "b_ptr": "*bf16", "out_ptr": "*fp32", "depth": "i32"}
found = [
    builds.Build("spills", spills, {"x_ptr": "*fp32"}, {"BLOCK": 8192}, num_warps=1),
    builds.Build("shares", shares, arguments, {"ROWS": 128, "BLOCK": 64}, num_warps=8, num_stages=9),
    builds.Build("odd depth", shares, arguments, {"ROWS": 32, "BLOCK": 32}, unaligned={"depth"}),
    builds.Build("even depth", shares, arguments, {"ROWS": 32, "BLOCK": 32}),
    builds.Build("no such argument", spills, {"y_ptr": "*fp32"}, {"BLOCK": 16}),
    builds.Build("no power of two", spills, {"x_ptr": "*fp32"}, {"BLOCK": 24}),
]
if __name__ == "__main__":
    for row in builds.compile_all(found, 1, (90,)):
        print(row.name, "|", builds.complaint(row) or row, flush=True)
"""


def run(arguments: list[str], tmp_path: Path) -> subprocess.CompletedProcess[str]:
    """Without the interpreter, with a cache of its own; away from the checkout, whose `platform` hides Python's."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path / "cache")
    command, pipes = [sys.executable, *arguments], {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment, text=True, start_new_session=True, **pipes
    ) as process:
        try:
            out, err = process.communicate()
        finally:
            # The compilers it forked too, where this test ran out of time.
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def check_rows(done: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert {row["arch"] for row in rows} == {80, 90}
    names = {row["name"].split("[")[0] for row in rows}
    assert {"rms_norm_backward", "qk_norm_rope_backward", "glu_backward"} <= names
    assert all(row["num_registers"] > 0 for row in rows)
    return rows


# A quarter of a minute on two idle cores, minutes on busy ones.
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_kernel_compiles(tmp_path: Path) -> None:
    """For both architectures, in one dtype each where it has several."""
    rows = check_rows(run(["-m", MODULE, "--quick"], tmp_path))
    kernels = {arch: {row["name"].rpartition("[")[0] for row in rows if row["arch"] == arch} for arch in (80, 90)}
    assert kernels[80] == kernels[90]
    assert sum("[fp32]" in row["name"] for row in rows) < sum("[bf16]" in row["name"] for row in rows) < len(rows)


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_every_kernel_compiles_in_every_dtype(tmp_path: Path) -> None:
    check_rows(run(["-m", MODULE], tmp_path))


def test_faults_are_found(tmp_path: Path) -> None:
    """A kernel that spills, one that wants too much shared memory, two that do not compile."""
    script = tmp_path / "faulty.py"
    script.write_text(FAULTY)
    done = run([str(script)], tmp_path)
    assert done.returncode == 0, done.stderr
    found = dict(line.split(" | ", 1) for line in done.stdout.splitlines() if " | " in line)
    assert "spills" in found["spills"], found
    assert "bytes of shared memory, a block has" in found["shares"], found
    # What 16 divides is loaded in wide pieces, what it does not is not: another program, with other registers.
    even, odd = (found[name].replace(name, "") for name in ("even depth", "odd depth"))
    assert even.startswith("Compiled(")
    assert odd.startswith("Compiled(")
    assert even != odd
    assert "the kernel takes ['BLOCK', 'x_ptr']" in found["no such argument"], found
    assert "CompilationError" in found["no power of two"], found


def test_what_is_complained_of() -> None:
    assert complaint(Compiled("k", 80, 163 * 1024, 255, 0)) is None
    assert "163841 bytes" not in str(complaint(Compiled("k", 90, 163 * 1024 + 1, 255, 0)))
    assert "166913 bytes of shared memory, a block has 166912" in str(complaint(Compiled("k", 80, 166913, 32, 0)))
    assert "spills 8 bytes" in str(complaint(Compiled("k", 90, 0, 255, 8)))
    assert complaint(Failed("k", 90, "ValueError: x")) == "k on sm_90: ValueError: x"


def test_dtypes_take_the_place_of_t() -> None:
    builds = for_dtypes("k", None, {"x": "*T", "n": "i64"}, {"B": 4}, dtypes=("bf16", "fp32"), num_warps=8)
    assert builds == [
        Build(f"k[{dtype}]", None, {"x": f"*{dtype}", "n": "i64"}, {"B": 4}, 8, 3) for dtype in ("bf16", "fp32")
    ]
