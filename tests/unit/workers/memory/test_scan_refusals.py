"""What mixers that scan refuse, and how mixers are found by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from headrace.helpers import scanning
from headrace.helpers.linear_attention import LINEAR_ATTENTION
from headrace.helpers.scans import HBM, MODEL, batch_of, by_chunk, by_layer, decoder, equal, gradients
from headrace.kernels.api import Packing
from headrace.storage.core.errors import InputError
from headrace.workers.memory.plan import LayerPlan, MemoryPlan, check_plan
from headrace.workers.memory.policy import skeletons_of
from headrace.workers.model import skeleton
from headrace.workers.model.config import ATTENTION
from headrace.workers.model.decoder import Decoder
from headrace.workers.model.generation import SamplingConfig, generate
from headrace.workers.model.hf_config import config_to_hf
from headrace.workers.model.mixers.registry import mixer_named, register
from headrace.workers.model.scan import ScanRule, pieces
from headrace.workers.model.skeleton import Reach


def _changed(patch: pytest.MonkeyPatch, change: Callable[[Any], Any], mixer: str = LINEAR_ATTENTION) -> None:
    """The registered mixer's part of a block, changed."""
    kind = type(mixer_named(mixer))
    right = kind.part
    patch.setattr(kind, "part", lambda self, shape: change(right(self, shape)))
    skeleton._dense_skeleton.cache_clear()
    patch.setattr(skeleton, "_dense_skeleton", skeleton._dense_skeleton.__wrapped__)


def _scan_with(**fields: Any) -> Callable[[Any], Any]:
    def change(part: Any) -> Any:
        made = fields.pop("widths", {})
        segments = []
        for segment in part.segments:
            makes = tuple(replace(t, width=made.get(t.name, t.width)) for t in segment.makes)
            own = fields if segment.name == "scan" else {}
            segments.append(replace(segment, makes=makes, **own))
        return part._replace(segments=tuple(segments))

    return change


@pytest.mark.parametrize("kind", ["keep", "chunk"])
@pytest.mark.parametrize(
    ("mixer", "fields", "tensor"),
    [
        (LINEAR_ATTENTION, {"widths": {"state": 100}}, "state"),
        (LINEAR_ATTENTION, {"widths": {"out": 10}}, "out"),
        (LINEAR_ATTENTION, {"widths": {"g_in": 3}}, "g_in"),
        (LINEAR_ATTENTION, {"needs": ("q", "k", "v", "state")}, "g"),
        (ATTENTION, {"widths": {"lse": 3}}, "lse"),
    ],
    ids=str,
)
def test_a_skeleton_that_lies_is_refused(
    mixer: str, fields: dict[str, Any], tensor: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _changed(monkeypatch, _scan_with(**fields), mixer)
    others = LINEAR_ATTENTION if mixer == ATTENTION else ATTENTION
    model = Decoder(replace(MODEL, mixers=[others, mixer]), dtype=torch.float64)
    model.init_weights(0)
    plan = by_chunk(model) if kind == "chunk" else by_layer(model, kind)
    before = [param.clone() for param in model.parameters()]
    # A state of another width is one that the mixer's own function fails on.
    kind_of = RuntimeError if "state" in fields.get("widths", ()) else InputError
    with pytest.raises(kind_of, match=rf"layer 1, segment \w+: {tensor} .*; correct the skeleton"):
        gradients(model, plan, [batch_of()])
    assert equal(before, list(model.parameters()))


@pytest.mark.parametrize("kind", ["keep", "chunk"])
def test_a_state_that_changes_its_shape_is_refused(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = scanning.LinearScan.forward

    def forward(self: Any, reads: Any, state: torch.Tensor) -> Any:
        made, after = right(self, reads, state)
        return made, after[:, :-1]

    monkeypatch.setattr(scanning.LinearScan, "forward", forward)
    model = decoder("hybrid")
    plan = by_chunk(model) if kind == "chunk" else by_layer(model, kind)
    with pytest.raises(InputError, match=r"layer 0, segment scan: state is \(2, 1, 127\) of .* says \(2, 1, 128\)"):
        gradients(model, plan, [batch_of()])


@pytest.mark.parametrize(
    "change",
    [
        lambda part: part._replace(skeletal=tuple(name for name in part.skeletal if name != "state")),
        _scan_with(reads=("q", "k", "v", "g")),
        _scan_with(reach=Reach.token),
        lambda part: part._replace(segments=part.segments[:-1]),
    ],
)
def test_a_skeleton_that_contradicts_itself(change: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    _changed(monkeypatch, change)
    with pytest.raises(ValueError, match=r"segment (scan|norm2)"):
        Decoder(replace(MODEL, mixers=[LINEAR_ATTENTION]), device="meta")


def test_the_state_of_a_scan_cannot_be_recomputed() -> None:
    model = decoder("scans")
    plan = MemoryPlan("p", (LayerPlan.of(x=HBM),) * 2)
    with pytest.raises(InputError, match="layer 0: state is the state of a scan and cannot be recomputed"):
        check_plan(plan, skeletons_of(model.blocks))


def test_what_knows_attention_only_refuses_other_mixers() -> None:
    with pytest.raises(InputError, match=r"model.mixers=.* cache of keys"):
        generate(Decoder(MODEL), [1], SamplingConfig())
    with pytest.raises(InputError, match=r"model.mixers=.* in every layer"):
        config_to_hf(MODEL, "float32")


def test_a_third_party_s_mixer_is_found_by_its_entry_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "theirs-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[headrace.mixers]\ntheirs = their_mixer\n")
    (tmp_path / "their_mixer.py").write_text(
        "from headrace.helpers.linear_attention import LinearAttentionMixer\n"
        "from headrace.workers.model.mixers.registry import register\n"
        "@register('theirs')\n"
        "class Theirs(LinearAttentionMixer):\n"
        "    leaf = 'theirs'\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    model = Decoder(replace(MODEL, num_layers=1, mixers=["theirs"]), device="meta")
    assert "blocks.0.theirs.g_proj.weight" in dict(model.named_parameters())


def test_names_of_mixers() -> None:
    with pytest.raises(InputError, match=r"model.mixers: 'none' is not registered; choose among attention, linear_att"):
        Decoder(replace(MODEL, mixers=["none"]), device="meta")
    with pytest.raises(InputError, match="name one mixer"):
        Decoder(replace(MODEL, mixers=[]), device="meta")
    with pytest.raises(ValueError, match=r"'linear_attention': .* has registered one of this name"):
        register(LINEAR_ATTENTION)(ScanRule)
    assert [MODEL.mixer_of(layer) for layer in range(3)] == [LINEAR_ATTENTION, ATTENTION, LINEAR_ATTENTION]


def test_responses_that_share_a_prompt_are_refused() -> None:
    packing = Packing.of_lengths((3, 2, 2), parents=(None, 0, 0))
    with pytest.raises(InputError, match=r"share a prompt.*layers that scan.*data\.share_prompts=false"):
        pieces(packing, 1, (0, 7))
