"""`headrace doctor --profile`: measures the machine in at most three minutes, each part in a process of its own.

A part that fails, hangs or takes the CUDA context with it loses its own rows only; the most important come
first, the one that may be killed for its memory last.
"""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from headrace.platform.children import PartResult, Row, find, run_part, serve
from headrace.platform.doctor.check import GIB
from headrace.platform.doctor.host_rates import disk_rates, host_memory
from headrace.platform.doctor.readings import gds_rows

THIS = "headrace.platform.doctor.machine_profile"
TOTAL_S = 180.0


RunPart = Callable[[str, Sequence[str], float], PartResult]


def run_own_part(name: str, words: Sequence[str], limit_s: float) -> PartResult:
    """Run one part of this module in a process of its own."""
    return run_part(THIS, [name, *words], limit_s=limit_s)


def measure(
    folder: Path,
    *,
    has_gpu: bool,
    run: RunPart = run_own_part,
    on_part: Callable[[str], None] = lambda line: None,
) -> tuple[list[Row], dict[str, str]]:
    """Run the parts in turn.

    Args:
        folder: whose drive is measured.
        run: runs one part within its limit.
        on_part: called with one line about the result of each part.

    Returns:
        The rows, and part -> why it is missing or not whole.
    """
    rows: list[Row] = []
    left_out: dict[str, str] = {}
    deadline_s = time.monotonic() + TOTAL_S
    for name in PARTS:
        if PARTS[name].needs_gpu and not has_gpu:
            left_out[name] = "no GPU"
            continue
        limit_s = min(PARTS[name].limit_s, deadline_s - time.monotonic())
        if limit_s < 5:
            left_out[name] = f"{TOTAL_S:.0f} s were over"
            continue
        result = run(name, [str(folder), str(limit_s)], limit_s)
        rows += result.rows
        rows.append({"what": "part", "name": name, "s": round(result.seconds, 2), "error": result.failure})
        if result.failure:
            left_out[name] = result.failure
        on_part(f"{name}: {len(result.rows)} rows in {result.seconds:.1f} s{_but(result.failure)}")
    return rows, left_out


def _but(failure: str | None) -> str:
    return f", then {failure}" if failure else ""


def hardware_fields(rows: Sequence[Row]) -> dict[str, float]:
    """The measured values under the names of HardwareProfile; what was not measured is left out.

    FLOP/s are the best GEMM rate of any size, of the GPU where there is one and else of the CPU; link rates are those
    of pinned memory, one direction at a time, and without a GPU those of copies within host memory; the rate of the
    GPU's memory is that of a copy within it, read and written together; drive rates count only with O_DIRECT. host_gib
    is the most that /proc/meminfo said, also after pages were touched: some virtual machines grow.
    """
    fields: dict[str, float] = {}
    what = "gemm" if find(rows, what="gemm") else "cpu_gemm"
    for key, dtype in (("bf16_tflops", "bfloat16"), ("fp32_tflops", "float32")):
        rates = [row["tflops"] for row in rows if row.get("what") == what and row.get("dtype") == dtype]
        if rates:
            fields[key] = _round(max(rates))
    for key in ("h2d", "d2h"):
        row = find(rows, what="copy", memory="pinned", direction=key)
        if row is None and what == "cpu_gemm":
            row = find(rows, what="host_copy")
        if row:
            fields[f"{key}_gbps"] = _round(row["gbps"])
    within = find(rows, what="copy", memory="device")
    if within:
        fields["memory_gbps"] = _round(within["gbps"])
    disk = find(rows, what="disk", direct=True)
    if disk:
        fields |= {f"ssd_{way}_gbps": _round(disk[f"{way}_gbps"]) for way in ("write", "read")}
        fields["ssd_gib"] = _round(disk["folder_free_gib"])
    totals = [row[key] for row in rows for key in ("mem_total_gib", "mem_total_gib_after") if key in row]
    if totals:
        fields["host_gib"] = _round(max(totals))
    device = find(rows, what="device")
    if device:
        fields["device_memory_gib"] = _round(device["memory_gib"])
    return fields


def _round(value: float) -> float:
    """Three significant digits, or one after the point: more would claim what a rerun does not give."""
    return float(f"{value:.3g}") if value < 100 else round(value, 1)


def _copy(folder: str, limit_s: str) -> Iterator[Row]:
    import torch

    from headrace.platform.doctor.rates import copy_rates

    properties = torch.cuda.get_device_properties(0)
    yield {"what": "device", "name": properties.name, "memory_gib": properties.total_memory / GIB}
    yield from copy_rates()


def _disk(folder: str, limit_s: str) -> Iterator[Row]:
    # A quarter GiB says how much the drive can move in a fifth of the time; that much, up to 8 GiB, is the answer.
    (first,) = disk_rates(folder, num_bytes=GIB // 4)
    seconds = 2 * first["bytes"] / 1e9 / min(first["write_gbps"], first["read_gbps"])
    num_bytes = int(first["bytes"] * min(32.0, 0.6 * float(limit_s) / seconds))
    yield from disk_rates(folder, num_bytes=num_bytes) if num_bytes > 2 * first["bytes"] else [first]


def _of_rates(name: str) -> Callable[[str, str], Iterable[Row]]:
    """A function of rates.py: only the child imports it, and torch with it."""

    def measured(folder: str, limit_s: str) -> Iterable[Row]:
        found: Iterable[Row] = getattr(importlib.import_module("headrace.platform.doctor.rates"), name)()
        return found

    return measured


@dataclass(frozen=True)
class Part:
    """A group of measurements: the seconds it may take, who makes them in the child, and whether it needs a GPU."""

    limit_s: float
    rows: Callable[[str, str], Iterable[Row]]
    needs_gpu: bool = True


# The limits sum up to TOTAL_S.
PARTS: dict[str, Part] = {
    "copy": Part(25, _copy),
    "gemm": Part(25, _of_rates("gemm_rates")),
    "host_memory": Part(10, lambda folder, limit_s: host_memory(), needs_gpu=False),
    "host": Part(20, _of_rates("cpu_rates"), needs_gpu=False),
    "disk": Part(35, _disk, needs_gpu=False),
    "gds": Part(15, lambda folder, limit_s: gds_rows(folder)),
    "pin": Part(50, _of_rates("pin_times")),
}

if __name__ == "__main__":
    serve({name: part.rows for name, part in PARTS.items()}, sys.argv[1:])
