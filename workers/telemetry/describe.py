"""The figures of a step that people watch, in one line. No torch."""

from __future__ import annotations

from collections.abc import Mapping

from headrace.workers.telemetry import names


def describe(metrics: Mapping[str, float]) -> str:
    """The figures people watch: loss, tokens/s per GPU, MFU, what the tiers hold."""
    parts = []
    for name, form in {
        names.LOSS_TRAIN: "loss {:.4f}",
        names.LOSS_EVAL: "eval {:.4f}",
        names.STEP_S: "{:.3g} s",
        names.TOKENS_PER_S_PER_GPU: "{:,.0f} tok/s",
        names.MFU_CAUSAL_PCT: "MFU {:.1f} %",
    }.items():
        if name in metrics:
            parts.append(form.format(metrics[name]))
    tiers = {"device": names.GPU_PEAK_GIB, "host": names.HOST_PEAK_GIB, "ssd": names.SSD_PEAK_GIB}
    held = [f"{tier} {_gib(metrics[name])}" for tier, name in tiers.items() if name in metrics]
    return "  ".join([*parts, " ".join(held)] if held else parts)


def _gib(value: float) -> str:
    return f"{value:.1f}G" if value >= 10 else f"{value:.2f}G" if value >= 1 else f"{value * 1024:.3g}M"
