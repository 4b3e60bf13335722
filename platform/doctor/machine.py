"""Checks of the machine: GPU, driver, memory and its limits, rates."""

from __future__ import annotations

import os
import re
import resource
import shutil
from collections.abc import Mapping
from pathlib import Path

from headrace.platform.children import PartResult
from headrace.platform.doctor.check import GIB, Check, fail, passed, warn
from headrace.platform.doctor.readings import TorchReading
from headrace.platform.planning.hardware import DeviceClass, HardwareProfile
from headrace.platform.planning.machine import fill_in
from headrace.platform.tracking.provenance import SOURCE_DIR
from headrace.storage.tiers.huge_pages import ON
from headrace.workers.telemetry.rate_book import RateBook

MIB = 2**20
# bf16 products and the flash operators want Ampere or newer.
OLDEST_CAPABILITY = (8, 0)
PCI_VENDOR_NVIDIA, PCI_CLASS_DISPLAY = "0x10de", "0x03"


def read_driver_version(proc: Path = Path("/proc/driver/nvidia/version")) -> str | None:
    """The kernel driver's version; None where it is not loaded."""
    if not proc.is_file():
        return None
    found = re.search(r"\b(\d{3,}\.\d+(?:\.\d+)?)\b", proc.read_text())
    return found[1] if found else "unknown version"


def read_pci_gpus(devices: Path = Path("/sys/bus/pci/devices")) -> int:
    """NVIDIA display devices on the PCI bus, with or without a driver."""

    def text(path: Path) -> str:
        return path.read_text().strip() if path.is_file() else ""

    return sum(
        text(device / "vendor") == PCI_VENDOR_NVIDIA and text(device / "class").startswith(PCI_CLASS_DISPLAY)
        for device in (devices.iterdir() if devices.is_dir() else ())
    )


def read_memlock_bytes() -> int | None:
    """The soft limit on locked memory; None where there is none."""
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    return None if limit == resource.RLIM_INFINITY else limit


def read_dev_shm(path: Path = Path("/dev/shm")) -> tuple[int, int] | None:
    """(size, free) bytes of the shared-memory file system; None where it is absent or not writable."""
    if not path.is_dir() or not os.access(path, os.W_OK):
        return None
    usage = shutil.disk_usage(path)
    return usage.total, usage.free


def read_datasheet_tflops(folder: Path = SOURCE_DIR / "conf" / "hardware") -> dict[str, float]:
    """Hardware name (`h200`, `rtx4090`) -> dense bf16 TFLOP/s, from the datasheet profiles of conf/hardware."""
    peaks = {}
    for path in sorted(folder.glob("*.yaml")):
        text = path.read_text()
        peak = re.search(r"^bf16_tflops: ([0-9.]+)", text, re.MULTILINE)
        if peak and re.search(r"^evidence: datasheet", text, re.MULTILINE):
            peaks[path.stem.split("_")[0]] = float(peak[1])
    return peaks


def check_gpu(torch: TorchReading | None, *, driver: str | None, num_pci: int) -> Check:
    """Whether there are GPUs, torch reaches them, and they are free."""
    gpus = torch.gpus if torch else []
    if not gpus and (driver or num_pci):
        why = (torch.cuda_error if torch else "") or (
            "torch could not be loaded to find out" if torch is None else "torch sees none"
        )
        remedy = "see the lines `driver` and `torch`; in a container, start it with the GPUs (docker run --gpus all)"
        return fail("gpu", f"there is a GPU, but it cannot be used: {why}", remedy)
    if not gpus:
        return warn("gpu", "none", "the CPU serves tests and small models; long sequences need an NVIDIA GPU")
    names = ", ".join(f"{gpu.name} {gpu.total_gib:.0f} GiB" for gpu in gpus)
    old = [gpu for gpu in gpus if gpu.capability < OLDEST_CAPABILITY]
    if old:
        capability = ".".join(map(str, old[0].capability))
        remedy = (
            "bf16 and flash attention need compute capability 8.0 (Ampere) or newer: hide it with CUDA_VISIBLE_DEVICES"
        )
        return fail("gpu", f"{names}; {old[0].name} has compute capability {capability}", remedy)
    busy = [(index, gpu) for index, gpu in enumerate(gpus) if gpu.free_gib < 0.9 * gpu.total_gib]
    if busy:
        index, gpu = busy[0]
        found = f"{names}; GPU {index} has {gpu.free_gib:.1f} of {gpu.total_gib:.1f} GiB free"
        return warn("gpu", found, "another process holds memory there: `nvidia-smi` lists it")
    return passed("gpu", names)


def check_driver(torch: TorchReading | None, *, driver: str | None, num_pci: int) -> Check:
    """The kernel driver, and whether it is new enough for the CUDA that torch was built for."""
    if driver is None:
        if num_pci:
            remedy = "install the NVIDIA driver, or load it: modprobe nvidia"
            return fail("driver", f"none, but {num_pci} NVIDIA device(s) on the PCI bus", remedy)
        return passed("driver", "none, and no NVIDIA device on the PCI bus")
    if torch is None or torch.cuda is None or torch.driver_cuda is None:
        return passed("driver", driver)
    wanted = tuple(int(word) for word in torch.cuda.split(".")[:2])
    found = f"{driver}, supports CUDA up to {'.'.join(map(str, torch.driver_cuda))}, torch was built for {torch.cuda}"
    if torch.driver_cuda < wanted:
        remedy = f"install a driver that supports CUDA {torch.cuda}, or a torch built for an older CUDA"
        return warn("driver", found, remedy) if torch.gpus else fail("driver", found, remedy)
    return passed("driver", found)


def check_host_memory(available_bytes: int, source: str) -> Check:
    """Memory that runs can still take: host tier, loaders, and on a CPU the model itself."""
    found = f"{available_bytes / GIB:.1f} GiB left by {source}"
    if available_bytes < GIB:
        return fail("host memory", found, "end other processes, or raise the limit (docker run --memory=...)")
    if available_bytes < 4 * GIB:
        return warn("host memory", found, "enough for small runs; set tiers.host.budget_gib to what may be used")
    return passed("host memory", found)


def check_locked_memory(limit_bytes: int | None, part: PartResult | None) -> Check:
    """The limit on locked memory, and with a GPU whether 1 GiB can be page-locked; `part` is None without a GPU."""
    limit = "unlimited" if limit_bytes is None else f"limit {limit_bytes / MIB:.0f} MiB"
    remedy = "ulimit -l unlimited (docker run --ulimit memlock=-1; LimitMEMLOCK=infinity in a systemd unit)"
    if part is None:
        return passed("locked memory", f"{limit}; nothing is page-locked without a GPU")
    row = part.find(what="pin")
    if row is None or "error" in row:
        return fail(
            "locked memory", f"{limit}; page-locking 1 GiB failed: {row['error'] if row else part.failure}", remedy
        )
    found = f"{limit}; 1 GiB page-locked in {row['pin_s']:.2f} s"
    if limit_bytes is not None:
        return warn("locked memory", found, f"CUDA goes past the limit here, network cards (RDMA) do not: {remedy}")
    return passed("locked memory", found)


def check_dev_shm(size_free: tuple[int, int] | None, *, num_gpus: int) -> Check:
    """/dev/shm: Ray's object store, and NCCL between GPUs."""
    remedy = (
        "mount -o remount,size=50% /dev/shm (docker run --shm-size=16g; an emptyDir of medium Memory in Kubernetes)"
    )
    if size_free is None:
        return fail("/dev/shm", "absent or not writable", remedy)
    size, free = size_free
    found = f"{free / GIB:.1f} of {size / GIB:.1f} GiB free"
    if free < 64 * MIB or (num_gpus > 1 and free < 256 * MIB * num_gpus):
        return fail("/dev/shm", found, remedy)
    if free < 2 * GIB:
        return warn("/dev/shm", f"{found}: Ray's object store moves to disk", remedy)
    return passed("/dev/shm", found)


def check_huge_pages(setting: str) -> Check:
    """Whether the host slab, which is a memfd, can have huge pages: fewer faults and faster copies.

    Args:
        setting: as storage/tiers/huge_pages.py reads it for memfds.
    """
    found = f"shmem_enabled is {setting}: memory in files has {'them' if setting in ON else 'none'}"
    if setting in ON:
        return passed("huge pages", found)
    if setting == "absent":
        return passed("huge pages", "this kernel has no huge pages for memory in files")
    return warn("huge pages", found, "echo advise > /sys/kernel/mm/transparent_hugepage/shmem_enabled")


def check_rates(folder: Path, book: RateBook) -> Check:
    """Measure again what `plan` and `train` count with on a CPU, and keep it."""
    book.forget()
    profile = fill_in(HardwareProfile(name="this machine", device_class=DeviceClass.cpu), [folder], book=book)
    found = (
        f"{1000 * (profile.fp32_tflops or 0):.3g} GFLOP/s in fp32, copies {profile.d2h_gbps:.1f} GB/s, measured anew "
        f"and kept in {book.path}"
    )
    if (busy := book.warning()) is not None:
        return warn("rates", f"{found}; {busy}", "stop the other programs and run `headrace doctor` again")
    return passed("rates", found)


def check_host_copy(part: PartResult) -> Check:
    """Copies within host memory, which bound the host tier on a CPU and every pageable copy."""
    row = part.find(what="host_copy")
    if row is None or "error" in row:
        return fail("host copy", f"could not be measured: {row['error'] if row else part.failure}", _LOOK_AT_TORCH)
    found = f"{row['gbps']:.1f} GB/s"
    if row["gbps"] < 2.0:
        return warn("host copy", found, "below 2 GB/s: is the machine busy, or swapping? `top`, `free -h`")
    return passed("host copy", found)


_LOOK_AT_TORCH = "see the line `torch`"


def check_gemm(torch: TorchReading | None, part: PartResult, peaks: Mapping[str, float]) -> Check:
    """The rate of matrix products; on a GPU with a profile in conf/hardware, compared with its datasheet."""
    row = part.find(what="gemm")
    if row is None or "error" in row:
        return fail("gemm", f"could not be measured: {row['error'] if row else part.failure}", _LOOK_AT_TORCH)
    found = f"{row['tflops']:.3g} TFLOP/s {row['dtype']}"
    if torch is None or not torch.gpus:
        if row["tflops"] < 0.005:
            return warn("gemm", found, "below 5 GFLOP/s: is the machine busy? OMP_NUM_THREADS sets torch's threads")
        return passed("gemm", found)
    name = torch.gpus[0].name.lower().replace(" ", "")
    peak = next((tflops for key, tflops in peaks.items() if key in name), None)
    if peak is None:
        return passed("gemm", found)
    share = 100 * row["tflops"] / peak
    found += f", {share:.0f} % of the datasheet"
    if share < 40:
        return warn(
            "gemm",
            found,
            "is another process on the GPU, its clock held down, or a MIG slice? `nvidia-smi -q -d CLOCK`",
        )
    return passed("gemm", found)
