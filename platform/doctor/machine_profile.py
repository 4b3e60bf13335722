"""`headrace doctor --profile`: measures the machine in at most five minutes and writes what it found.

Every part runs in a process of its own with its own limit, the most wanted first: a part that fails, hangs or takes the
CUDA context with it costs its own rows and nothing else.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from headrace.platform.doctor.rates import (
    GIB,
    Row,
    copy_rates,
    disk_rates,
    gds_state,
    gemm_rates,
    host_memory,
    pin_times,
)


def _attention() -> Iterable[Row]:
    from headrace.platform.doctor.attention_table import attention_rows

    return attention_rows(time.monotonic() + PARTS["attention"].limit_s - 20)


@dataclass(frozen=True)
class Part:
    """One group of measurements: the function that yields its rows, and the seconds it may take."""

    rows: Callable[[], Iterable[Row]]
    limit_s: float
    needs_gpu: bool = True


PARTS: dict[str, Part] = {
    "copy": Part(copy_rates, 30),
    "gemm": Part(gemm_rates, 30),
    "attention": Part(_attention, 130),
    "host_memory": Part(host_memory, 10, needs_gpu=False),
    "gds": Part(gds_state, 20, needs_gpu=False),
    "disk": Part(disk_rates, 40, needs_gpu=False),
    "pin": Part(pin_times, 75),
}


def measure(names: Iterable[str] = tuple(PARTS)) -> list[Row]:
    """Run the named parts, each in its own process; a part that fails yields one row with its error."""
    rows: list[Row] = []
    for name in names:
        start = time.monotonic()
        part = PARTS[name]
        command = [sys.executable, "-m", "headrace.platform.doctor.machine_profile", name]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=part.limit_s, check=False)
            text, failure = done.stdout, (done.stderr[-500:] if done.returncode else None)
        except subprocess.TimeoutExpired as error:
            text = (error.stdout or b"").decode() if isinstance(error.stdout, bytes) else (error.stdout or "")
            failure = f"took over {part.limit_s:.0f} s"
        rows += [json.loads(line) for line in text.splitlines() if line.startswith("{")]
        if failure:
            rows.append({"what": name, "error": failure})
        rows.append({"what": "part", "name": name, "s": round(time.monotonic() - start, 2)})
    return rows


def find(rows: Iterable[Row], **wanted: object) -> Row | None:
    """The first row that has all the wanted values."""
    return next((row for row in rows if all(row.get(key) == value for key, value in wanted.items())), None)


def hardware_fields(rows: list[Row], *, device_memory_gib: float | None) -> Mapping[str, float]:
    """The measured values under the names of HardwareProfile; what was not measured is left out.

    bf16_tflops is the best GEMM rate of any size; link rates are those of pinned memory, one direction at a time.
    """
    fields: dict[str, float] = {}
    gemm = [row["tflops"] for row in rows if row.get("what") == "gemm" and row.get("dtype") == "bfloat16"]
    if gemm:
        fields["bf16_tflops"] = round(max(gemm), 1)
    for key, wanted in {
        "h2d_gbps": {"what": "copy", "memory": "pinned", "direction": "h2d"},
        "d2h_gbps": {"what": "copy", "memory": "pinned", "direction": "d2h"},
    }.items():
        row = find(rows, **wanted)
        if row and "gbps" in row:
            fields[key] = round(row["gbps"], 2)
    disk = find(rows, what="disk")
    if disk and disk.get("direct"):
        fields["ssd_write_gbps"], fields["ssd_read_gbps"] = round(disk["write_gbps"], 2), round(disk["read_gbps"], 2)
    memory = find(rows, what="host_memory")
    if memory:
        fields["host_gib"] = round(memory["mem_total_gib"], 1)
    if device_memory_gib is not None:
        fields["device_memory_gib"] = round(device_memory_gib, 1)
    return fields


def device_name_and_memory() -> tuple[str, float] | None:
    """Name and GiB of CUDA device 0, or None where there is none."""
    import torch

    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    return properties.name, properties.total_memory / GIB


def main() -> None:
    """Run one part and print its rows as JSON lines (the child side of `measure`)."""
    for row in PARTS[sys.argv[1]].rows():
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
