"""Whether copies hide behind compute: matrix products with and without traffic of a tier beside them.

Both directions of the tier flow at once, as fast as they go, from a thread of their own (on CUDA with a stream of its
own), while the main thread multiplies matrices. Products alone and products with traffic take turns; a stretch with
traffic is compared with the geometric mean of the two stretches alone around it, as in tier_rounds.

    slowdown             how much longer the products take with traffic beside them: alone / beside - 1, of the rates
    lost share           how much of the products' rate is gone: 1 - beside / alone
    memory share (CPU)   the traffic's bytes through memory over those of a plain copy in the same rounds. A copy reads
                         and writes every byte: 2. Host traffic on CPU is such a copy: 2. Traffic to a drive is copied
                         into or out of the staging ring and read or written there by the drive: 3. Checksums read what
                         lies in the cache and do not count.
    processor share (CPU) the processor time that the traffic costs per byte where it runs alone, times its rate beside
                         the products, over the cores. Products that use all cores lose at least that much, however
                         threads are scheduled.

On CUDA the target is a bound on the slowdown. On CPU the processor does the copies itself, so a rate is lost in any
case, and the target is that no more is lost than the share of the memory bandwidth that the traffic takes.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median

import torch

from headrace.bench.harness import Row, Target
from headrace.bench.tier_copies import PlainCopy
from headrace.bench.tier_rounds import neighbour_ratios
from headrace.bench.tier_sigterm import end_if_told
from headrace.bench.tier_traffic import TierTraffic
from headrace.storage.core.errors import HeadraceError
from headrace.storage.core.records import Medium

BLOCK_BYTES = 16 * 1024**2
CUDA_SIZE, CPU_SIZE = 8192, 1024
CUDA_LIMIT_PCT = 3.0
MEMORY_BYTES_PER_BYTE = {Medium.host: 2.0, Medium.ssd: 3.0}


class Products:
    """A stretch of square matrix products on one device: bf16 on CUDA, fp32 with all cores on CPU.

    Args:
        stretch_s: about how long a stretch takes without anything beside it.
    """

    def __init__(self, device: torch.device, stretch_s: float) -> None:
        self._device = device
        size = CUDA_SIZE if device.type == "cuda" else CPU_SIZE
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self._a, self._b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        self._out = torch.empty_like(self._a)
        self._count = 3
        self.tflops()  # the first ones pay for libraries and pages
        per_s = self.tflops() * 1e12 / (2.0 * size**3)
        self._count = max(3, round(stretch_s * per_s))

    def tflops(self) -> float:
        """TFLOP/s of one stretch: by events of the stream on CUDA, by the clock on CPU."""
        flop = self._count * 2.0 * self._a.shape[0] ** 3
        if self._device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize(self._device)
            begin.record()
            self._multiply()
            end.record()
            end.synchronize()
            return flop / begin.elapsed_time(end) / 1e9
        begin_s = time.perf_counter()
        self._multiply()
        return flop / (time.perf_counter() - begin_s) / 1e12

    def _multiply(self) -> None:
        for _ in range(self._count):
            torch.mm(self._a, self._b, out=self._out)


@dataclass(frozen=True)
class Rates:
    """What was seen, one figure per round (`alone_tflops` has one more); `traffic_cpu_s_per_gb` of traffic alone."""

    alone_tflops: list[float]
    beside_tflops: list[float]
    traffic_gbps: list[float]
    traffic_alone_gbps: list[float]
    plain_gbps: list[float]
    traffic_cpu_s_per_gb: list[float]


def overlap_row(
    name: str,
    traffic: TierTraffic,
    medium: Medium,
    device: torch.device,
    plain: PlainCopy | None,
    *,
    round_bytes: int,
    rounds: int,
    stretch_s: float,
) -> Row:
    """Measure one tier.

    Args:
        plain: the plain copy of host memory, on CPU; None on CUDA.
        round_bytes: of the tier's source.
    """
    block_bytes = min(BLOCK_BYTES, round_bytes // traffic.blocks_of_flow()) // 4096 * 4096
    traffic.use_blocks(block_bytes, traffic.blocks_of_flow())
    with _all_cores():
        rates = _measure(traffic, Products(device, stretch_s), device, plain, round_bytes, rounds, stretch_s)
    config = {"block_bytes": block_bytes, "device": str(device), "medium": medium.value}
    return judge(name, rates, MEMORY_BYTES_PER_BYTE[medium], config)


def judge(name: str, rates: Rates, memory_bytes_per_byte: float, config: dict[str, object]) -> Row:
    """The row of what was seen; which target holds is said at the head of the file."""
    ratios = neighbour_ratios(rates.beside_tflops, rates.alone_tflops)
    kept = median(ratios)
    slowdown_pct, lost_pct = 100.0 * (1.0 / kept - 1.0), 100.0 * (1.0 - kept)
    found: dict[str, float | int | None] = {
        "slowdown_pct": slowdown_pct,
        "slowdown_pct_min": 100.0 * (1.0 / max(ratios) - 1.0),
        "slowdown_pct_max": 100.0 * (1.0 / min(ratios) - 1.0),
        "lost_share_pct": lost_pct,
        "traffic_gbps": median(rates.traffic_gbps),
        "traffic_alone_gbps": median(rates.traffic_alone_gbps),
        "alone_tflops": median(rates.alone_tflops),
        "beside_tflops": median(rates.beside_tflops),
        "rounds": len(ratios),
    }
    if not rates.plain_gbps:
        return Row(name, found, config, Target(f"at most {CUDA_LIMIT_PCT:g} % slower", slowdown_pct <= CUDA_LIMIT_PCT))
    plain_gbps = median(rates.plain_gbps)
    share_pct = 100.0 * median(rates.traffic_gbps) * memory_bytes_per_byte / (2.0 * plain_gbps)
    processor_s_per_s = median(rates.traffic_gbps) * median(rates.traffic_cpu_s_per_gb)
    found |= {
        "memory_share_pct": share_pct,
        "processor_share_pct": 100.0 * processor_s_per_s / len(os.sched_getaffinity(0)),
        "plain_copy_gbps": plain_gbps,
    }
    config = {**config, "memory_bytes_per_byte": memory_bytes_per_byte}
    text = "no more of the products' rate is lost than the traffic takes of the memory bandwidth"
    return Row(name, found, config, Target(text, lost_pct <= share_pct))


def _measure(
    traffic: TierTraffic,
    products: Products,
    device: torch.device,
    plain: PlainCopy | None,
    round_bytes: int,
    rounds: int,
    stretch_s: float,
) -> Rates:
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    rates = Rates([products.tflops()], [], [], [], [], [])
    for _ in range(rounds):
        end_if_told()
        with _flowing(traffic, stream) as gbps:
            rates.beside_tflops.append(products.tflops())
            rates.traffic_gbps.append(gbps())
        rates.alone_tflops.append(products.tflops())
        with _flowing(traffic, stream) as gbps:
            begin_s, begin_cpu_s = time.perf_counter(), time.process_time()
            time.sleep(stretch_s)
            rates.traffic_alone_gbps.append(gbps())
            cpu_s, wall_s = time.process_time() - begin_cpu_s, time.perf_counter() - begin_s
            rates.traffic_cpu_s_per_gb.append(cpu_s / wall_s / rates.traffic_alone_gbps[-1])
        if plain is not None:
            rates.plain_gbps.append(plain.move(round_bytes).gbps)
    return rates


@contextmanager
def _flowing(traffic: TierTraffic, stream: torch.cuda.Stream | None) -> Iterator[Callable[[], float]]:
    """Traffic on a thread of its own; the context begins when bytes have moved.

    Args:
        stream: the same one for every stretch, because a slot that is given back is ordered by it; None on CPU.

    Yields a function: GB/s since then.

    Raises:
        HeadraceError: a transfer failed.
    """
    stop, failures = threading.Event(), list[BaseException]()

    def run() -> None:
        try:
            with torch.cuda.stream(stream):
                traffic.flow(stop)
        except BaseException as error:
            failures.append(error)

    first_bytes = traffic.moved_bytes
    thread = threading.Thread(target=run, name="bench-traffic", daemon=True)
    thread.start()
    try:
        while traffic.moved_bytes == first_bytes and thread.is_alive():
            time.sleep(1e-3)
        begin_s, begin_bytes = time.perf_counter(), traffic.moved_bytes
        yield lambda: (traffic.moved_bytes - begin_bytes) / (time.perf_counter() - begin_s) / 1e9
    finally:
        stop.set()
        thread.join()
    if failures:
        raise HeadraceError(f"the traffic beside the products failed: {failures[0]}") from failures[0]


@contextmanager
def _all_cores() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    try:
        yield
    finally:
        torch.set_num_threads(before)
