"""Compile Triton kernels ahead of time, without a GPU: what each takes in shared memory, registers and spills.

Triton's interpreter must be off (TRITON_INTERPRET unset).
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from triton import compile as triton_compile
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

DTYPES = ("bf16", "fp16", "fp32")
# What one block may have in shared memory, in bytes, per compute capability (CUDA C++ Programming Guide).
SHARED_LIMIT_BYTES = {80: 163 * 1024, 90: 227 * 1024}
QUICK_DTYPE = {80: "fp32", 90: "bf16"}


@dataclass(frozen=True)
class Build:
    """One kernel as it is launched.

    Args:
        name: names the row, for example "rms_norm_forward[bf16]".
        kernel: the function under @triton.jit.
        signature: Triton's type of every argument that is no constexpr: "*bf16", "*fp32", "*i64", "i64", "fp32".
        constexprs: value of every tl.constexpr argument.
        unaligned: pointers and integers that 16 does not divide; it divides the others, as it does for most shapes.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 3
    unaligned: Collection[str] = ()


@dataclass(frozen=True)
class Compiled:
    """What the compiler says of one build. Registers are per thread; spills are bytes stored and loaded per thread."""

    name: str
    arch: int
    shared_bytes: int
    num_registers: int
    spilled_bytes: int


@dataclass(frozen=True)
class Failed:
    """A build that the compiler refused, and why."""

    name: str
    arch: int
    error: str


def for_dtypes(
    name: str,
    kernel: Any,
    signature: Mapping[str, str],
    constexprs: Mapping[str, Any] | None = None,
    *,
    dtypes: Iterable[str] = DTYPES,
    num_warps: int = 4,
    num_stages: int = 3,
) -> list[Build]:
    """One Build per dtype: "*T" in the signature means a pointer to it ("*bf16", "*fp16", "*fp32")."""
    return [
        Build(
            name=f"{name}[{dtype}]",
            kernel=kernel,
            signature={key: f"*{dtype}" if kind == "*T" else kind for key, kind in signature.items()},
            constexprs=dict(constexprs or {}),
            num_warps=num_warps,
            num_stages=num_stages,
        )
        for dtype in dtypes
    ]


def compile_build(build: Build, arch: int) -> Compiled:
    """Compile for one compute capability (80, 90).

    Raises:
        ValueError: an argument with neither a type nor a value, or a name that is no argument of the kernel.
    """
    arguments = list(build.kernel.arg_names)
    given = {*build.signature, *build.constexprs}
    if given != set(arguments) or set(build.signature) & set(build.constexprs):
        raise ValueError(f"build {build.name}: {sorted(given)} given, the kernel takes {sorted(arguments)}, each once")
    signature = {key: build.signature.get(key, "constexpr") for key in arguments}
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, (key, kind) in enumerate(signature.items())
        if (kind.startswith("*") or kind in ("i32", "i64")) and key not in build.unaligned
    }
    source = ASTSource(build.kernel, signature, dict(build.constexprs), aligned)
    options = {"num_warps": build.num_warps, "num_stages": build.num_stages}
    log = io.StringIO()
    # The assembler's log alone tells the spills; a kernel from the cache comes without it.
    with knobs.nvidia.scope(), knobs.compilation.scope(), contextlib.redirect_stdout(log):
        knobs.nvidia.dump_ptxas_log = True
        knobs.compilation.always_compile = True
        compiled = triton_compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    text = log.getvalue()
    return Compiled(
        name=build.name,
        arch=arch,
        shared_bytes=int(compiled.metadata.shared),
        num_registers=int(_only(r"Used (\d+) registers", text)),
        spilled_bytes=int(_only(r"(\d+) bytes spill stores", text)) + int(_only(r"(\d+) bytes spill loads", text)),
    )


def _only(pattern: str, text: str) -> str:
    """The group of the last match: kernels without calls have one, and one that calls reports its callees first."""
    found = re.findall(pattern, text)
    if not found:
        raise ValueError(f"the assembler's log has nothing like {pattern!r}:\n{text}")
    return found[-1]


def complaint(row: Compiled | Failed) -> str | None:
    """What is wrong with a build: it failed, takes more shared memory than a block has, or spills registers."""
    place = f"{row.name} on sm_{row.arch}"
    if isinstance(row, Failed):
        return f"{place}: {row.error}"
    if row.shared_bytes > SHARED_LIMIT_BYTES[row.arch]:
        return f"{place}: {row.shared_bytes} bytes of shared memory, a block has {SHARED_LIMIT_BYTES[row.arch]}"
    if row.spilled_bytes:
        return f"{place}: spills {row.spilled_bytes} bytes per thread at {row.num_registers} registers"
    return None


def compile_all(
    found: list[Build], num_processes: int, arches: Iterable[int] = tuple(SHARED_LIMIT_BYTES), *, quick: bool = False
) -> Iterator[Compiled | Failed]:
    """Every build for every architecture, in order, by processes forked from this one.

    Args:
        quick: of the builds that differ in the dtype alone, only fp32 for sm_80 and only bf16 for sm_90.
    """
    names = {build.name for build in found}
    tasks = [(build, arch) for build in found for arch in arches]
    if quick:
        instead = [(task, f"{task[0].name.rpartition('[')[0]}[{QUICK_DTYPE[task[1]]}]") for task in tasks]
        tasks = [task for task, name in instead if name == task[0].name or name not in names]
    _tasks.extend(tasks)
    try:
        with multiprocessing.get_context("fork").Pool(num_processes) as pool:
            yield from pool.imap(_compile_task, range(len(tasks)))
    finally:
        _tasks.clear()


# Kernels cannot be pickled: the children find them here, where they were forked, and get a number.
_tasks: list[tuple[Build, int]] = []


def _compile_task(number: int) -> Compiled | Failed:
    build, arch = _tasks[number]
    try:
        return compile_build(build, arch)
    except Exception as error:
        # Whatever the compiler raises belongs to this row; the others still want an answer.
        return Failed(build.name, arch, f"{type(error).__name__}: {error}")
