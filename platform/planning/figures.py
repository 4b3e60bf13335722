"""The figures of a plan that a program reads: of one step of one rank, None where a rate is not known. No torch."""

from __future__ import annotations

from headrace.platform.planning import priced
from headrace.platform.planning.predict import missing_rates
from headrace.platform.planning.request import GIB, PlanRequest
from headrace.storage.core.records import Medium
from headrace.workers.memory.plan import MemoryPlan
from headrace.workers.telemetry.flops import step_flops

DAY_S = 86400
GB = 1e9
Figures = dict[str, float | None]
# What only a plan that fits has.
TIMED = (
    "step_s",
    "tokens_per_s_per_gpu",
    "mfu_causal_pct",
    "mfu_full_attention_pct",
    "hfu_pct",
    "exposed_s",
    "ssd_tb_per_day",
)
MOVED = ("d2h_gb", "h2d_gb", "ssd_write_gb", "ssd_read_gb")


def peaks(wanted: dict[Medium, int], request: PlanRequest) -> Figures:
    """Of every tier; `host_gib_per_node` is what all ranks of a node offload."""
    return {
        "gpu_peak_gib": wanted[Medium.hbm] / GIB,
        "host_peak_gib": wanted[Medium.host] / GIB,
        "ssd_peak_gib": wanted[Medium.ssd] / GIB,
        "host_gib_per_node": request.ranks_per_node * wanted[Medium.host] / GIB,
    }


def figures(plan: MemoryPlan, request: PlanRequest) -> Figures:
    """Of a plan.

    GB is 1e9 bytes, GiB 1024^3, TB 1e12. d2h_gb and h2d_gb go to the host tier and come back, ssd_write_gb and
    ssd_read_gb those of the SSD. The three utilisations are those of telemetry.flops.mfu, with every row one document,
    against the profile's rate of the compute dtype.
    """
    work, number = priced.work_of(plan, request), request.micro_batches
    moved = (work.host, work.load_host, work.ssd, work.load_ssd)
    found: Figures = {name: number * num_bytes / GB for name, num_bytes in zip(MOVED, moved, strict=True)}
    return {**dict.fromkeys(TIMED), **peaks(priced.wanted_bytes(plan, request), request), **found} | _timed(
        plan, request
    )


def _timed(plan: MemoryPlan, request: PlanRequest) -> Figures:
    work, number, rates = priced.work_of(plan, request), request.micro_batches, request.rates()
    if missing_rates(work, rates):
        return {}
    seconds = priced.seconds(plan, request)
    step_s, degree = seconds.total * number, request.num_sharers
    num_rows = request.batch_size * number
    causal, full = (
        step_flops(request.model, [request.seq_len] * num_rows, causal=causal, adapter=request.adapter) / degree
        for causal in (True, False)
    )
    flops = (causal, full, causal + number * (work.rerun_flops - work.codec_flops - work.skipped_flops))
    profile = request.profile
    tflops = profile.bf16_tflops if request.itemsize == 2 else profile.fp32_tflops
    assert tflops is not None, "a known rate"
    ranks = request.ranks_per_node if profile.device_class.value == "cpu" else 1
    shares = (100 * ranks * each / (step_s * tflops * 1e12) for each in flops)
    return {
        "step_s": step_s,
        "tokens_per_s_per_gpu": num_rows * request.seq_len / degree / step_s,
        **dict(zip(("mfu_causal_pct", "mfu_full_attention_pct", "hfu_pct"), shares, strict=True)),
        "exposed_s": seconds.exposed * number,
        "ssd_tb_per_day": request.ranks_per_node * number * work.ssd / step_s * DAY_S / 1e12,
    }
