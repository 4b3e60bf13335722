"""What one device, its node's links and its drives can do. The content of conf/hardware/*.yaml. No torch, no Ray."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Evidence(StrEnum):
    """Where a profile's numbers come from."""

    datasheet = "datasheet"
    measured = "measured"


class DeviceClass(StrEnum):
    """How bytes on the device are counted: cuda has an allocator with a hard limit; on cpu we meter saved tensors."""

    cuda = "cuda"
    cpu = "cpu"


@dataclass(kw_only=True, slots=True)
class HardwareProfile:
    """One kind of machine. GB/s is 1e9 bytes per second, TFLOP/s is 1e12; None means unknown until measured.

    Args:
        name: for people; the file's name.
        evidence: datasheet link and drive rates are peaks, multiplied by link_efficiency; measured ones stand.
        device_memory_gib: GiB of one device that a process can allocate.
        bf16_tflops / fp32_tflops: dense, with fp32 accumulation, no sparsity.
        memory_gbps: that the device's own memory reads and writes, together; None: a codec's time is not priced.
        h2d_gbps / d2h_gbps: pinned host memory to device and back, one device, one direction.
        host_gib: memory of the node.
        host_gbps: what the node's host memory gives to the copies of all devices together, one direction; None: as much
            as their links take.
        node_network_gbps / network_gbps: between devices of a node, and from one device to other nodes; of one device,
            one direction.
        ssd_write_gbps / ssd_read_gbps: O_DIRECT rates of the node's drives, shared by all of its ranks.
        ssd_gib: space for slab files on the node.
        compute_efficiency: share of the TFLOP/s rate (a peak, or the best product measured) that a decoder layer is
            assumed to reach.
        link_efficiency: share of a datasheet link rate that a copy is assumed to reach.
    """

    name: str
    device_class: DeviceClass = DeviceClass.cuda
    evidence: Evidence = Evidence.datasheet
    device_memory_gib: float | None = None
    bf16_tflops: float | None = None
    fp32_tflops: float | None = None
    h2d_gbps: float | None = None
    d2h_gbps: float | None = None
    host_gib: float | None = None
    ssd_write_gbps: float | None = None
    ssd_read_gbps: float | None = None
    ssd_gib: float | None = None
    memory_gbps: float | None = None
    host_gbps: float | None = None
    node_network_gbps: float | None = None
    network_gbps: float | None = None
    compute_efficiency: float = 0.5
    link_efficiency: float = 0.8

    def flops_per_s(self, itemsize: int) -> float | None:
        """FLOP/s that a layer is expected to reach (itemsize 2: bf16, 4: fp32); None where the rate is unknown."""
        tflops = self.bf16_tflops if itemsize == 2 else self.fp32_tflops
        if tflops is None:
            return None
        return tflops * 1e12 * self.compute_efficiency

    def link_bytes_per_s(self, gbps: float | None) -> float | None:
        """Bytes/s expected of a link or drive whose listed rate is `gbps`."""
        if gbps is None:
            return None
        return gbps * 1e9 * (self.link_efficiency if self.evidence is Evidence.datasheet else 1.0)
