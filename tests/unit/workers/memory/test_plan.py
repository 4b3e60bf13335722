from __future__ import annotations

import json
import pickle
from dataclasses import replace

import pytest

from headrace.helpers.training import TINY_MODEL
from headrace.storage.core.errors import InputError
from headrace.storage.core.records import Medium
from headrace.workers.memory.config import MemoryPreset
from headrace.workers.memory.plan import Cuts, LayerPlan, MemoryPlan, Residence, Stretch, check_plan, keep_layer
from headrace.workers.memory.presets import PRESETS, preset_plan
from headrace.workers.memory.schedule import BlobSpec, Schedule, counted_blobs, moved_bytes
from headrace.workers.model.skeleton import dense_skeleton, opaque_skeleton

SKELETON = dense_skeleton(TINY_MODEL)
HBM, HOST, SSD, AGAIN = Residence
FRONT = (Stretch(0, 32, AGAIN), Stretch(32, None, HOST))


def test_json_round_trip() -> None:
    layers = (LayerPlan.of(x=HOST), LayerPlan({"x": (Stretch(0, None, SSD),), "gate": FRONT}), LayerPlan.of(x=HOST))
    plan = MemoryPlan("auto", layers, cuts=Cuts(16, 32), prefetch_layers=3, predicted={"mem/gpu_peak_gib": 1.5})
    data = json.loads(json.dumps(plan.to_dict()))
    assert MemoryPlan.from_dict(data) == plan
    assert data["layers"] == [0, 1, 0]
    with pytest.raises(ValueError, match="schema 1"):
        MemoryPlan.from_dict({**data, "schema_version": 1})


@pytest.mark.parametrize(
    "row",
    [
        (Stretch(0, 16, HBM),),
        (Stretch(16, None, HBM),),
        (Stretch(0, 16, HBM), Stretch(32, None, HOST)),
        (Stretch(0, 32, HBM), Stretch(16, None, HOST)),
        (Stretch(0, 0, HBM), Stretch(0, None, HOST)),
        (),
    ],
)
def test_stretches_that_overlap_or_leave_a_gap(row: tuple[Stretch, ...]) -> None:
    with pytest.raises(ValueError, match="tensor gate"):
        LayerPlan({"gate": row})


@pytest.mark.parametrize(
    ("layer", "cuts", "wanted"),
    [
        (LayerPlan.of(x=AGAIN), Cuts(16), "x"),
        (LayerPlan.of(out=HBM), Cuts(16), "x"),
        (LayerPlan.of(x=HBM, act=HBM), Cuts(16), "act"),
        (LayerPlan({"x": (Stretch(0, None, HBM),), "gate": FRONT}), Cuts(24), "gate"),
        (LayerPlan({"x": (Stretch(0, None, HBM),), "out": FRONT}), Cuts(16), "out"),
        (LayerPlan({"x": (Stretch(0, None, HBM),), "out": FRONT}), Cuts(16, 24), "out"),
    ],
)
def test_a_plan_that_does_not_fit_the_blocks_names_layer_and_tensor(layer: LayerPlan, cuts: Cuts, wanted: str) -> None:
    plan = MemoryPlan("mine", (keep_layer(SKELETON), layer), cuts=cuts)
    with pytest.raises(InputError, match=rf"'mine', layer 1.*{wanted}"):
        check_plan(plan, [SKELETON] * 2)
    with pytest.raises(InputError, match="2 layers, the model has 3"):
        check_plan(plan, [SKELETON] * 3)


def test_a_plan_that_travels_leaves_its_hash_behind() -> None:
    """Another process has other hashes of strings."""
    plan = LayerPlan.of(x=Residence.hbm, out=Residence.host)
    assert hash(plan) == plan._hash
    there = pickle.loads(pickle.dumps(plan))
    assert "_hash" not in vars(there)
    assert there == plan
    assert {there: 1}[plan] == 1


def test_a_foreign_block_has_one_place_for_its_input() -> None:
    check_plan(MemoryPlan("p", (LayerPlan.of(x=HOST),)), [opaque_skeleton()])
    with pytest.raises(InputError, match="layer 0: x"):
        check_plan(MemoryPlan("p", (LayerPlan({"x": (Stretch(0, 32, HBM), *FRONT[1:])}),)), [opaque_skeleton()])


def test_blobs_and_bytes_by_hand() -> None:
    plan = LayerPlan({"x": (Stretch(0, None, HOST),), "gate": FRONT, "lse": (Stretch(0, None, SSD),)})
    found = counted_blobs(plan, Cuts(8), Schedule(SKELETON), 50)
    assert [(b.name, b.span, number) for b, number in found] == [
        ("x", (0, 50), 1), ("lse", (0, 50), 1), ("gate", (32, 40), 2), ("gate", (48, 50), 1)
    ]  # fmt: skip
    whole = MemoryPlan("p", (plan, keep_layer(SKELETON)), cuts=Cuts(16))
    moved = moved_bytes(whole, [SKELETON] * 2, batch_size=3, num_tokens=50, itemsize=2)
    assert moved == {Medium.host: 3 * (50 * 32 * 2 + 18 * 64 * 2), Medium.ssd: 3 * 50 * 4 * 4}
    pages = moved_bytes(whole, [SKELETON] * 2, batch_size=3, num_tokens=50, itemsize=2, round_to=4096)
    assert pages == {Medium.host: 12288 + 8192 + 4096, Medium.ssd: 4096}


def test_what_one_place_takes_at_one_moment_is_one_blob() -> None:
    """Out and LSE, q and k, gate and up; not residual, which an earlier segment makes, nor parts of whole tensors."""
    places = {"q": HOST, "k": HOST, "v": SSD, "out": SSD, "lse": SSD, "residual": HOST, "gate": HOST, "up": HOST}
    plan = LayerPlan.of(x=HOST, **places)
    found = [(b.name, b.span, b.medium.value) for b, _ in counted_blobs(plan, Cuts(32), Schedule(SKELETON), 50)]
    tiles = [(0, 32), (32, 50)]
    assert found == [
        ("x", (0, 50), "host"),
        ("q+k", (0, 50), "host"),
        ("v", (0, 50), "ssd"),
        ("out+lse", (0, 50), "ssd"),
        *(("residual", tile, "host") for tile in tiles),
        *(("gate+up", tile, "host") for tile in tiles),
    ]
    parts = LayerPlan({"x": (Stretch(0, None, HBM),), **dict.fromkeys(("q", "k", "v", "gate", "up"), FRONT)})
    names = [(b.name, b.span) for b, _ in counted_blobs(parts, Cuts(32), Schedule(SKELETON), 50)]
    assert names == [("q", (32, 50)), ("k", (32, 50)), ("v", (32, 50)), ("gate+up", (32, 50))]


def test_bytes_of_a_blob_with_gaps() -> None:
    """Three rows of lse are 3 x 4 x 4 bytes, of out 3 x 32 x 2: where lse comes first, out begins at the next 16."""
    blob = BlobSpec(("lse", "out"), (0, 3), Medium.host)
    assert blob.num_bytes(SKELETON, 1, 2) == 48 + 192
    one = BlobSpec(("lse", "out"), (0, 1), Medium.host)
    assert one.num_bytes(SKELETON, 1, 2) == 16 + 64
    odd = dense_skeleton(replace(TINY_MODEL, num_heads=3, num_kv_heads=3, head_dim=2))
    assert BlobSpec(("lse", "out"), (0, 1), Medium.host).num_bytes(odd, 1, 2) == 16 + 12  # 12 bytes of lse, a gap of 4


def test_presets() -> None:
    for preset in MemoryPreset:
        if preset not in PRESETS:
            with pytest.raises(InputError):
                preset_plan(preset, [SKELETON] * 2)
            continue
        plan = preset_plan(preset, [SKELETON] * 5, prefetch_layers=2)
        num_same = 3 if preset is MemoryPreset.memo else 4
        check_plan(plan, [SKELETON] * 5)
        assert len(set(plan.layers[:num_same])) == 1
        assert not plan.layers[-1].moves  # the last block's backward starts at once
    checkpoint, recompute = (preset_plan(name, [SKELETON] * 3).layers for name in ("checkpoint", "recompute"))
    assert checkpoint == recompute


def test_the_keep_twin_has_the_same_cuts() -> None:
    plan = MemoryPlan("p", (LayerPlan.of(x=SSD),) * 2, cuts=Cuts(16, 32))
    twin = plan.keep_twin([SKELETON] * 2)
    assert twin.cuts == plan.cuts
    assert twin.layers == (keep_layer(SKELETON),) * 2
