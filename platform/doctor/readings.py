"""The doctor's readings of torch, DALI, KvikIO and the drive, each in a child process (platform/children.py)."""

from __future__ import annotations

import ctypes
import importlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from headrace.platform.children import Row, serve
from headrace.platform.doctor.check import GIB


@dataclass(frozen=True)
class Gpu:
    """One CUDA device as torch sees it."""

    name: str
    capability: tuple[int, int]
    total_gib: float
    free_gib: float


@dataclass(frozen=True)
class TorchReading:
    """What torch says of itself.

    Args:
        version: without the local part.
        cuda: version it was built for, as "13.0"; None for a CPU build.
        cuda_error: why CUDA cannot be used, "" if it can be used or was not requested.
        driver_cuda: newest CUDA that the driver supports, (major, minor); None without libcuda.
        nccl: version as text; None where torch has none.
        peer_access: whether every pair of GPUs can copy directly; None below two.
    """

    version: str
    cuda: str | None = None
    cuda_error: str = ""
    driver_cuda: tuple[int, int] | None = None
    nccl: str | None = None
    peer_access: bool | None = None
    gpus: list[Gpu] = field(default_factory=list)

    @classmethod
    def from_row(cls, row: Row) -> TorchReading:
        """From the JSON that the child printed."""
        values = {key: value for key, value in row.items() if key != "what"}
        values["gpus"] = [Gpu(**{**gpu, "capability": tuple(gpu["capability"])}) for gpu in row["gpus"]]
        values["driver_cuda"] = None if row["driver_cuda"] is None else tuple(row["driver_cuda"])
        return cls(**values)


def torch_rows(interface: str | None = None) -> Iterator[Row]:
    """torch itself, then host copy, GEMM, a collective of one rank, and on a GPU page-locking of 1 GiB.

    Args:
        interface: for the collective, as cluster.interface; None: the one that a run would take.
    """
    import torch

    from headrace.platform.doctor.rates import host_copy_gbps

    yield {"what": "torch", **_torch(torch)}
    gpu = torch.cuda.is_available()
    yield _guarded("host_copy", lambda: {"gbps": host_copy_gbps()})
    yield _guarded("gemm", lambda: _gemm(torch, gpu))
    yield _guarded("collective", lambda: _collective(torch, "nccl" if gpu else "gloo", interface))
    if gpu:
        yield _guarded("pin", _pin)


def _guarded(what: str, measure: Callable[[], Row]) -> Row:
    """The row, or one with the error: the next measurement is wanted all the same."""
    try:
        return {"what": what, **measure()}
    except Exception as error:
        return {"what": what, "error": f"{type(error).__name__}: {error}"[:300]}


def _torch(torch: Any) -> Row:
    row: Row = {"version": torch.__version__.split("+")[0], "cuda": torch.version.cuda, "cuda_error": "", "gpus": []}
    row |= {"driver_cuda": _driver_cuda(), "nccl": None, "peer_access": None}
    if torch.version.cuda is None:
        return row
    try:
        torch.cuda.init()
        count = torch.cuda.device_count()
        for index in range(count):
            properties = torch.cuda.get_device_properties(index)
            free = torch.cuda.mem_get_info(index)[0]
            row["gpus"].append(
                {
                    "name": properties.name,
                    "capability": [properties.major, properties.minor],
                    "total_gib": properties.total_memory / GIB,
                    "free_gib": free / GIB,
                }
            )
        pairs = [(a, b) for a in range(count) for b in range(count) if a != b]
        row["peer_access"] = all(torch.cuda.can_device_access_peer(a, b) for a, b in pairs) if pairs else None
    except (RuntimeError, AssertionError) as error:
        row["cuda_error"] = str(error).strip().splitlines()[0][:300]
    if torch.distributed.is_available() and torch.distributed.is_nccl_available():
        row["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    return row


def _driver_cuda() -> list[int] | None:
    try:
        library, number = ctypes.CDLL("libcuda.so.1"), ctypes.c_int()
    except OSError:
        return None
    if library.cuDriverGetVersion(ctypes.byref(number)) != 0:
        return None
    return [number.value // 1000, number.value % 1000 // 10]


def _gemm(torch: Any, gpu: bool) -> Row:
    from headrace.workers.telemetry.gemm import measure_gemm_flops

    device, dtype = (torch.device("cuda"), torch.bfloat16) if gpu else (torch.device("cpu"), torch.float32)
    return {"dtype": str(dtype)[6:], "tflops": measure_gemm_flops(device, dtype) / 1e12}


def _collective(torch: Any, backend: str, interface: str | None) -> Row:
    """One rank that reduces with itself over the interface of a run: libraries load, a communicator is made."""
    from headrace.workers.actors.net import own_address, use_interface

    start = time.perf_counter()
    used = use_interface(own_address(), interface)[f"{backend.upper()}_SOCKET_IFNAME"]
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=10))
    torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timedelta(seconds=10))
    ones = torch.ones(1024, device="cuda" if backend == "nccl" else "cpu")
    torch.distributed.all_reduce(ones)
    total = float(ones.sum())
    torch.distributed.destroy_process_group()
    if total != 1024.0:
        raise RuntimeError(f"the sum of 1024 ones came back as {total}")
    return {"backend": backend, "s": time.perf_counter() - start, "interface": used}


def _pin() -> Row:
    from headrace.platform.doctor.rates import pin_times

    return next(iter(pin_times((1,))))


def dali_rows() -> Iterator[Row]:
    """The version of DALI, after a CPU pipeline has returned the expected values."""
    dali: Any = importlib.import_module("nvidia.dali")  # its annotations say less than it does
    fn: Any = importlib.import_module("nvidia.dali.fn")

    pipeline = dali.Pipeline(batch_size=1, num_threads=1, device_id=None)
    with pipeline:
        pipeline.set_outputs(fn.constant(idata=[7], shape=[1]))
    pipeline.build()
    value = int(pipeline.run()[0].as_array()[0, 0])
    if value != 7:
        raise RuntimeError(f"a pipeline of the constant 7 gave {value}")
    yield {"what": "dali", "version": dali.__version__}


def disk_rows(folder: str) -> Iterable[Row]:
    """A short O_DIRECT write and read in the folder."""
    from headrace.platform.doctor.host_rates import disk_rates

    return disk_rates(folder, num_bytes=GIB // 4)


def gds_rows(folder: str) -> Iterator[Row]:
    """KvikIO by itself, then the engine that a run would choose below `folder` (real: nvidia-fs counts a transfer)."""
    try:
        import kvikio

        yield {"what": "kvikio", "version": kvikio.__version__, "error": ""}
    except Exception as error:  # no libcufile, no libcuda, an old driver
        yield {"what": "kvikio", "version": None, "error": f"{type(error).__name__}: {error}"[:300]}
    import torch

    from headrace.storage.config import SsdEngine, SsdTierConfig
    from headrace.storage.tiers.engines import choose_engine
    from headrace.storage.tiers.ssd_slab import SsdSlab
    from headrace.storage.transfer import open_copies

    with SsdSlab(folder, GIB // 64) as slab:
        copies = open_copies(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        choice = choose_engine(slab.lease("doctor", GIB // 64), SsdTierConfig(), copies)
    yield {"what": "engine", "got": choice.got.value, "why": choice.why, "real": choice.got is SsdEngine.gds}


PARTS: dict[str, Callable[..., Iterable[Row]]] = {
    "torch": torch_rows,
    "dali": dali_rows,
    "disk": disk_rows,
    "gds": gds_rows,
}

if __name__ == "__main__":
    serve(PARTS, sys.argv[1:])
