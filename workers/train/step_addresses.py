"""train.allocator=planned: the tensors of a step take solved addresses in one arena, on CUDA.

    step 1        warm-up: kernels are chosen, states are made
    step 2        its requests are recorded: bytes and order, and when each is freed
    then          one address per request is solved (memory/addresses.py)
    later steps   the n-th request takes its address; the arena is one tensor, made at the start of a step

torch's allocator serves, as without a plan, a request that is not where the record has it, one of another stream, one
that another stream uses, and one that outlives its step. Where a step had requests off the plan, the addresses are
solved again from that step's own record; after NUM_TRIES such steps in a row the plan is dropped. An address is given
out only while nothing alive overlaps it, so a plan changes no bit.

torch.cuda.MemPool cannot do this: its allocator is asked for segments, never for a tensor's memory, and only for the
tensors of one thread. CUDAPluggableAllocator has neither caching nor statistics. So a C++ file puts an allocator around
torch's own; it is compiled at the first use.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from headrace.storage.core.errors import InputError, MachineError
from headrace.storage.remote.cache import cache_errors, cache_home
from headrace.workers.memory.addresses import Addresses, Request, live_bytes, plan_addresses

SOURCE = Path(__file__).with_suffix(".cpp")
REMEDY = "or set train.allocator=caching"
NUM_TRIES = 3
LEFT_ALONE = -1  # of the C++ file: an offset of a request that has none, an end that has not come, the bytes of a mark
_UINT64 = ctypes.c_uint64


class StepAddresses:
    """Records steps, plans addresses, and has them served.

    Args:
        library: the C++ file, loaded.
        new_arena: makes an arena of so many bytes: what keeps it alive, and its address.
        stream: the compute stream, as a number.
    """

    def __init__(
        self, library: ctypes.CDLL, new_arena: Callable[[int], tuple[Any, int]], stream: Callable[[], int]
    ) -> None:
        self._library, self._new_arena, self._stream = library, new_arena, stream
        library.headrace_end.restype = ctypes.c_size_t
        self._plan = np.zeros((0, 2), dtype=np.int64)
        self._arena_bytes = self._num_steps = self._num_tries = 0
        self._arena: tuple[Any, int] | None = None
        self._live_bytes = self._num_served = 0
        self.note: Callable[[str, str], None] = lambda kind, text: None

    def __str__(self) -> str:
        """For the run's record."""
        return (
            f"{self._num_served} of {len(self._plan)} requests of the last step served from an arena of "
            f"{self._arena_bytes} bytes; {self._live_bytes} bytes of them alive at once"
        )

    def mark(self) -> None:
        """A block's pass begins."""
        self._library.headrace_mark()

    @contextmanager
    def step(self) -> Iterator[None]:
        """A step: everything that the current stream is asked for inside it, by any thread."""
        if self._arena is None and len(self._plan):
            self._arena = self._new_arena(self._arena_bytes)
        base = 0 if self._arena is None else self._arena[1]
        plan = self._plan if base else self._plan[:0]
        self._library.headrace_begin(
            ctypes.c_void_p(self._stream()),
            plan.ctypes.data_as(ctypes.c_void_p),
            ctypes.c_size_t(len(plan)),
            _UINT64(base),
            _UINT64(self._arena_bytes),
        )
        try:
            yield
        finally:
            num_records = self._library.headrace_end()
        self._num_steps += 1
        records, counts = np.zeros((num_records, 4), dtype=np.int64), np.zeros(3, dtype=np.int64)
        self._library.headrace_read(*(numbers.ctypes.data_as(ctypes.c_void_p) for numbers in (records, counts)))
        self._num_served, num_strange, num_in_use = counts.tolist()
        if num_in_use == 0:
            self._arena = None  # torch's allocator may use the memory until the next step
        if self._num_steps > 1 and self._num_tries < NUM_TRIES:
            self._judge(records, num_strange, is_empty=num_in_use == 0)

    def _judge(self, records: np.ndarray[Any, Any], num_strange: int, *, is_empty: bool) -> None:
        """Plan, plan again, or give up."""
        if len(self._plan):
            if num_strange == 0:
                self._num_tries = 0
                return
            self._num_tries += 1
            words = f"{num_strange} request(s) of step {self._num_steps} were off the planned addresses"
            if self._num_tries == NUM_TRIES:
                self._plan = self._plan[:0]
                words += f", as in the {NUM_TRIES - 1} steps before: torch's allocator serves all from here on"
                self.note("addresses_dropped", f"{words}. Set train.allocator=caching")
                return
            then = "the addresses are solved anew" if is_empty else "the plan stays, because a part of it is in use"
            self.note("addresses_replanned", f"{words}: torch's allocator served them, and {then}")
        if is_empty:
            self._plan, found, self._live_bytes = plan_of_records(records)
            self._arena_bytes = found.arena_bytes


def plan_of_records(records: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], Addresses, int]:
    """The plan of a recorded step.

    Args:
        records: (n, 4) of bytes, begin, end, movable, in the order of the requests; marks among them.

    Returns:
        (m, 2) of bytes and offset of every request; the addresses of those that have one; their bytes alive at once.
    """
    marks, wanted = records[records[:, 0] == LEFT_ALONE, 1], records[records[:, 0] != LEFT_ALONE]
    has_address = (wanted[:, 2] != LEFT_ALONE) & (wanted[:, 3] == 1)
    requests = [Request(*row) for row in wanted[has_address, :3].tolist()]
    found = plan_addresses(requests, marks.tolist())
    plan = np.stack((wanted[:, 0], np.full(len(wanted), LEFT_ALONE, dtype=np.int64)), axis=1)
    plan[has_address, 1] = found.offsets
    return plan, found, live_bytes(requests)


def open_addresses(device: torch.device) -> StepAddresses:
    """Put the planned allocator around torch's; it stays until the process ends, and does nothing between steps.

    Raises:
        InputError: the device is none of CUDA. MachineError: the C++ file cannot be compiled here.
    """
    if device.type != "cuda":
        raise InputError(f"train.allocator=planned: needs CUDA and the run is on {device.type}; set it to caching")
    index = torch.empty(1, device=device).device.index  # and torch's allocator begins
    library = _installed(index)

    def new_arena(num_bytes: int) -> tuple[torch.Tensor, int]:
        arena = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        return arena, arena.data_ptr()

    return StepAddresses(library, new_arena, lambda: torch.cuda.current_stream(device).cuda_stream)


_loaded: list[ctypes.CDLL] = []


def _installed(index: int) -> ctypes.CDLL:
    """The library of this process, which goes around torch's allocator once."""
    if not _loaded:
        root = Path(torch.__file__).parent
        major, minor = torch.__version__.split(".")[:2]
        words = [f"-DHEADRACE_TORCH={100 * int(major) + int(minor)}", f"-I{root / 'include'}", f"-I{_cuda_headers()}"]
        library = build(cache_home() / "compiled", [*words, f"-L{root / 'lib'}", "-lc10_cuda", "-lc10"])
        library.headrace_install(index)
        _loaded.append(library)
    return _loaded[0]


def build(folder: Path, words: Sequence[str] = ()) -> ctypes.CDLL:
    """Compile the C++ file, unless that has been done, and load it.

    Args:
        folder: where libraries are kept. words: for the compiler, beside those that are always there.

    Raises:
        MachineError: no compiler, or it refuses; with its first lines.
    """
    compiler = shutil.which(os.environ.get("CXX") or "c++")
    if compiler is None:
        raise MachineError(f"train.allocator=planned: no C++ compiler; install g++ 11 or newer, {REMEDY}")
    command = [compiler, "-std=c++20", "-O2", "-shared", "-fPIC", str(SOURCE), *words]
    key = hashlib.sha256(repr((command, torch.__version__, SOURCE.read_bytes())).encode()).hexdigest()[:16]
    path = folder / f"step_addresses-{key}.so"
    if not path.exists():
        with cache_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            own = Path(tempfile.mkdtemp(dir=folder)) / path.name  # ranks of a node compile at the same time
        try:
            made = subprocess.run([*command, "-o", str(own)], capture_output=True, text=True, check=False)
            if made.returncode:
                first = "\n".join(made.stderr.splitlines()[:5])
                raise MachineError(f"train.allocator=planned: {compiler} cannot compile its file:\n{first}\n{_HEADERS}")
            own.replace(path)
        finally:
            shutil.rmtree(own.parent)
    return ctypes.CDLL(str(path))


_HEADERS = (
    f"Install a CUDA toolkit, or the packages nvidia-cuda-runtime and nvidia-cuda-crt of torch's version, {REMEDY}"
)


def _cuda_headers() -> Path:
    """The folder of CUDA's headers: of a toolkit, or of the packages beside torch."""
    homes = [os.environ.get(name, "") for name in ("CUDA_HOME", "CUDA_PATH")]
    folders = [Path(home) / "include" for home in (*homes, "/usr/local/cuda") if home]
    folders += sorted(Path(sysconfig.get_paths()["purelib"]).glob("nvidia/*/include"))
    for folder in folders:
        if (folder / "cuda_runtime_api.h").is_file():
            return folder
    raise MachineError(f"train.allocator=planned: no cuda_runtime_api.h on this machine. {_HEADERS}")
