"""The pictures of the concepts page, drawn from the code's own objects: plans, segments, hardware profiles."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import yaml

from headrace.platform.paths import CONF_DIR
from headrace.workers.memory.config import MemoryPreset
from headrace.workers.memory.plan import Cuts, Residence
from headrace.workers.memory.presets import Choices, preset_plan
from headrace.workers.model.config import Family, ModelConfig
from headrace.workers.model.skeleton import dense_skeleton

COLOURS = {
    Residence.hbm: "#2a9d8f",
    Residence.host: "#e9c46a",
    Residence.ssd: "#e07a5f",
    Residence.recompute: "#d9dee3",
}
WORDS = {
    Residence.hbm: "device",
    Residence.host: "host memory",
    Residence.ssd: "drive",
    Residence.recompute: "computed again",
}
WIDTH, CELL = 480, 34
INK = "#22303a"
LAYERS, CHUNKS, TOKENS = 6, 8, 8192


def _model(name: str) -> ModelConfig:
    values = yaml.safe_load((CONF_DIR / "model" / f"{name}.yaml").read_text())
    return ModelConfig(**{**values, "family": Family(values["family"]), "rope_scaling": None})


def _text(x: float, y: float, text: str, *, anchor: str = "start", weight: str = "normal", size: int = 14) -> str:
    return (
        f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" font-weight="{weight}" font-size="{size}" fill="{INK}">'
        f"{text}</text>"
    )


def _box(x: float, y: float, width: float, height: float, fill: str, *, line: str = "#ffffff") -> str:
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="3" fill="{fill}" stroke="{line}"/>'


def _picture(height: float, title: str, parts: Sequence[str]) -> str:
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}" role="img" font-family="sans-serif">'
    )
    return "\n".join([head, f"<title>{title}</title>", _box(0, 0, WIDTH, height, "#ffffff"), *parts, "</svg>"])


def _key(y: float) -> list[str]:
    parts, x = [], 12.0
    for place, colour in COLOURS.items():
        parts += [_box(x, y, 16, 16, colour, line=INK), _text(x + 22, y + 13, WORDS[place])]
        x += 38 + 7.6 * len(WORDS[place])
    return parts


def grid() -> str:
    """Layers by chunks: where the memo preset keeps `gate`, a skeletal tensor of the MLP, with a part on each tier."""
    skeletons = [dense_skeleton(_model("llama3_8b"))] * LAYERS
    choices = Choices(seq_len=TOKENS, host_fraction=0.375, ssd_fraction=0.25)
    cuts = Cuts(token_tile=TOKENS // CHUNKS)
    plan = preset_plan(MemoryPreset.memo, skeletons, prefetch_layers=1, cuts=cuts, choices=choices)
    left, top = 92, 40
    parts = [_text(left + CHUNKS * CELL / 2, 24, "token chunks of the row", anchor="middle", weight="bold")]
    for layer in range(LAYERS):
        y = top + (LAYERS - 1 - layer) * CELL
        parts.append(_text(left - 10, y + CELL / 2 + 5, f"layer {layer}", anchor="end"))
        stretches = plan.layers[layer].stretches["gate"]
        for chunk, (begin, _) in enumerate(cuts.tiles(TOKENS)):
            (place,) = {s.residence for s in stretches if s.span(TOKENS)[0] <= begin < s.span(TOKENS)[1]}
            parts.append(_box(left + chunk * CELL, y, CELL, CELL, COLOURS[place]))
    y = top + LAYERS * CELL + 14
    return _picture(y + 28, "A step as a grid of layers and chunks", [*parts, *_key(y)])


def skeleton() -> str:
    """The segments of a block and what each makes; skeletal tensors filled, with bytes per token in bf16."""
    block = dense_skeleton(_model("llama3_8b"))
    parts = [_text(12, 24, "segment", weight="bold"), _text(92, 24, "kind", weight="bold")]
    parts.append(_text(180, 24, "makes (KiB per token in bf16)", weight="bold"))
    y = 38.0
    rows = [("", "", (block.root,)), *((s.name, s.kind.value, s.makes) for s in block.segments)]
    for segment, kind, makes in rows:
        parts += [_text(12, y + 17, segment or "(input)"), _text(92, y + 17, kind)]
        x = 180.0
        for made in makes:
            if made.is_aside and made.name not in block.skeletal:
                continue  # the scale of a norm: a few bytes per token
            name = f"{made.name} {made.bytes_per_token(2) / 1024:.3g}"
            width = 14 + 7.8 * len(name)
            kept = made.name in block.skeletal
            parts.append(_box(x, y, width, 24, COLOURS[Residence.hbm] if kept else "#ffffff", line=INK))
            parts.append(_text(x + width / 2, y + 17, name, anchor="middle"))
            x += width + 6
        y += 32
    parts += [
        _box(12, y + 4, 16, 16, COLOURS[Residence.hbm], line=INK),
        _text(36, y + 17, "skeletal: backward needs it"),
    ]
    parts.append(_text(250, y + 17, "white: computed again from it"))
    return _picture(y + 34, "The segments of a decoder block", parts)


def tiers() -> str:
    """Device, host and drive with the rates of the H200 profile."""
    values = yaml.safe_load((CONF_DIR / "hardware" / "h200.yaml").read_text())
    links = {
        "host memory": f"{values['d2h_gbps']:g} GB/s down and {values['h2d_gbps']:g} GB/s up for each GPU (data sheet)",
        "drive": "as measured: headrace doctor --profile",
    }
    rows = [
        (Residence.hbm, "device", f"{values['device_memory_gib']:g} GiB: weights, the step, what the plan keeps"),
        (Residence.host, "host memory", "one pinned slab per node, mapped by every rank"),
        (Residence.ssd, "drive", "slab files with 4 KiB slots, O_DIRECT or GDS"),
    ]
    parts, y = [], 12.0
    for place, name, what in rows:
        if name in links:
            arrows = f"M60 {y - 40:g} v34 m-5 -7 l5 7 l5 -7 M80 {y - 6:g} v-34 m-5 7 l5 -7 l5 7"
            parts.append(f'<path d="{arrows}" stroke="{INK}" fill="none"/>')
            parts.append(_text(100, y - 18, links[name]))
        parts += [_box(12, y, WIDTH - 24, 54, COLOURS[place], line=INK), _text(24, y + 23, name, weight="bold")]
        parts.append(_text(24, y + 43, what, size=13))
        y += 100
    return _picture(y - 34, "The three tiers", parts)


def sweeps() -> str:
    """The order of the cells in forward: by layer and by chunk."""
    num_layers, chunks = 4, len(Cuts(chunks=(1024,)).chunk_spans(4096))
    size, parts = 44, []
    orders: dict[str, Callable[[int, int], int]] = {
        "by_layer": lambda layer, chunk: layer * chunks + chunk,
        "by_chunk": lambda layer, chunk: chunk * num_layers + layer,
    }
    for i, (name, order) in enumerate(orders.items()):
        left = 44 + i * 240
        parts.append(_text(left + chunks * size / 2, 24, name, anchor="middle", weight="bold"))
        for layer in range(num_layers):
            for chunk in range(chunks):
                x, y = left + chunk * size, 36 + (num_layers - 1 - layer) * size
                shade = 1 - order(layer, chunk) / (num_layers * chunks)
                parts.append(_box(x, y, size, size, f"hsl(173 45% {45 + 45 * (1 - shade):.0f}%)"))
                parts.append(_text(x + size / 2, y + size / 2 + 5, str(order(layer, chunk) + 1), anchor="middle"))
        parts.append(_text(left + chunks * size / 2, 56 + num_layers * size, "chunks", anchor="middle"))
        parts.append(
            f'<text transform="translate({left - 10} {36 + num_layers * size / 2:g}) rotate(-90)" '
            f'text-anchor="middle" font-size="14" fill="{INK}">layers</text>'
        )
    return _picture(68 + num_layers * size, "The order of the cells in the two sweeps", parts)


PICTURES: dict[str, Callable[[], str]] = {"grid": grid, "skeleton": skeleton, "tiers": tiers, "sweeps": sweeps}
