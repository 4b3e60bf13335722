"""Our decoder against transformers, in every precision, family and setting; then our decoder broken on purpose."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from headrace.helpers.tiers import has_id
from headrace.helpers.verifying import DYNAMIC, LLAMA3, SHARED, YARN, MakeFolder, run, soak_unless
from headrace.kernels.api import CodecName
from headrace.storage.core.errors import ErrorId, InputError, MachineError
from headrace.storage.core.records import Direction
from headrace.storage.core.states import BlobState
from headrace.storage.stack import TierStack
from headrace.workers.memory.chunk_plan import KvShape, kv_bytes
from headrace.workers.memory.config import MemoryPreset
from headrace.workers.memory.policy import apply_memory, skeletons_of
from headrace.workers.memory.presets import PRESETS, preset_plan
from headrace.workers.memory.schedule import moved_bytes
from headrace.workers.model.decoder import Decoder
from headrace.workers.model.hf import load_config
from headrace.workers.model.program import RowPart
from headrace.workers.model.skeleton import dense_skeleton
from headrace.workers.parallel.config import ZBV, Vocabulary
from headrace.workers.verify import ours
from headrace.workers.verify.batches import random_batches
from headrace.workers.verify.config import VerifyConfig, VerifyDevice, VerifyDtype

FAMILIES = ["llama", "qwen2", "qwen3", "mistral"]


@pytest.mark.parametrize("family", FAMILIES)
def test_fp64_packed_documents_batch_two_micro_batches_two_steps(make_folder: MakeFolder, family: str) -> None:
    result = run(make_folder(family), batch=2, documents=3, micro_batches=2, steps=2, loss_tile=16)
    assert result.failures() == []
    assert result.loss_rel_error <= 1e-11
    assert result.max_rel_error <= 1e-11
    assert result.noise_params == ()


SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "window": ("mistral", {"sliding_window": 5}),
    "qwen_window": ("qwen2", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 0}),
    "llama3_rope": ("llama", {"rope_parameters": LLAMA3}),
    "linear_rope": ("qwen3", {"rope_parameters": {"rope_type": "linear", "factor": 4.0}}),
    "dynamic_rope": ("llama", DYNAMIC),
    "yarn_rope": ("qwen2", YARN),
    "tied_llama": (
        "llama",
        {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 777.0}},
    ),
    "untied_qwen2": ("qwen2", {"tie_word_embeddings": False, "num_key_value_heads": 1}),
    "tied_qwen3": ("qwen3", {"tie_word_embeddings": True, "num_key_value_heads": 4, "rms_norm_eps": 1e-3}),
}


@pytest.mark.parametrize(
    ("name", "documents"),
    [
        *((name, 3) for name in SHAPES),
        # A row that is one document matters where the length or the window does.
        *(soak_unless(name in ("window", "dynamic_rope"), name, 1) for name in SHAPES),
    ],
)
def test_fp64_shapes(make_folder: MakeFolder, name: str, documents: int) -> None:
    family, fields = SHAPES[name]
    folder = make_folder(family, **fields)
    result = run(folder, seq_len=33, batch=2, documents=documents)
    assert result.failures() == []
    names = {"lm_head.weight"} & result.params.keys()
    assert bool(names) is not json.loads((folder / "config.json").read_text())["tie_word_embeddings"]


@pytest.mark.parametrize("family", FAMILIES)
def test_fp64_attention_in_head_groups(make_folder: MakeFolder, family: str) -> None:
    """Documents whose responses share a prompt, in two rows."""
    result = run(make_folder(family), memory=MemoryPreset.memo, head_groups=2, **SHARED)
    assert result.failures() == []
    assert result.max_rel_error <= 1e-11
    assert result.bit_equal_to_keep is True


def test_head_groups_that_do_not_divide_the_heads_are_refused(make_folder: MakeFolder) -> None:
    with pytest.raises(InputError, match="head_groups=3: the model has 2 KV heads; choose of 1, 2"):
        run(make_folder("llama"), head_groups=3)


@pytest.mark.parametrize("family", FAMILIES)
def test_fp32_within_its_bound_of_transformers_as_it_is(make_folder: MakeFolder, family: str) -> None:
    result = run(make_folder(family), dtype=VerifyDtype.fp32, batch=2, documents=2, steps=2)
    assert result.failures() == []
    assert 0.0 < result.max_rel_error <= 5e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_errs_as_transformers_does(make_folder: MakeFolder, family: str) -> None:
    result = run(make_folder(family), dtype=VerifyDtype.bf16, seq_len=48)
    assert result.failures() == []
    assert result.bf16 is not None
    assert 1e-3 < result.bf16.whole_transformers < 0.1
    assert result.to_json()["whole_ratio"] <= 1.2


@pytest.mark.parametrize("preset", [preset for preset in PRESETS if preset is not MemoryPreset.checkpoint])
def test_every_preset_is_bit_equal_to_keep_and_moves_what_the_formula_says(
    make_folder: MakeFolder, preset: MemoryPreset
) -> None:
    folder = make_folder("qwen3", num_hidden_layers=4)
    result = run(folder, batch=2, memory=preset)
    assert result.failures() == []
    assert result.bit_equal_to_keep is (None if preset in (MemoryPreset.keep, MemoryPreset.chunk) else True)
    model = load_config(folder)
    skeletons = [dense_skeleton(model)] * 4
    plan = ours.verify_plan(preset, skeletons, 24)
    wanted = {}
    if preset.is_by_chunk:
        shape = KvShape(4, 2, 24, 2 * model.head_size, 8)
        found = kv_bytes(shape, plan.cuts, plan.kv, plan.kv_grads, plan.pages)
        for way, moved in (("load", found.loaded), ("store", found.stored)):
            wanted |= {f"{way}/{tier.value}": count for tier, count in moved.items() if count}
        assert result.moved_bytes == wanted
        assert bool(wanted) == (preset is not MemoryPreset.chunk)
        return
    for way in Direction:  # what is still on its way out serves its load, so fewer bytes come back
        planned = moved_bytes(plan, skeletons, batch_size=2, num_tokens=24, itemsize=8, direction=way)
        wanted |= {f"{way.value}/{tier.value}": count for tier, count in planned.items() if count}
    assert result.moved_bytes == wanted
    moves = {"host": {"offload_host", "alst", "memo"}, "ssd": {"offload_ssd", "ssdtrain", "memo"}}
    for tier, names in moves.items():
        assert (f"store/{tier}" in wanted) == (preset.value in names)


def test_a_lossy_plan_is_said_to_be_lossy_and_its_errors_are_not_judged(make_folder: MakeFolder) -> None:
    result = run(make_folder("llama"), seq_len=64, memory=MemoryPreset.chunk_sparse, chunk_size=16)
    assert result.max_rel_error > 1e-3
    assert result.failures() == []
    assert result.bit_equal_to_keep is True
    assert (result.to_json()["lossy"], result.to_json()["bound"]) == (True, None)


def test_a_codec_is_lossy_and_its_bits_do_not_depend_on_the_place(make_folder: MakeFolder) -> None:
    codec, folder = CodecName.eight_bit_token, make_folder("llama", num_hidden_layers=4)
    result = run(folder, dtype=VerifyDtype.fp32, memory=MemoryPreset.ssdtrain, codec=codec)
    assert result.loss_rel_error <= 1e-6, "forward is exact"
    assert 1e-4 < result.max_rel_error < 0.1
    assert (result.bit_equal_to_keep, result.failures(), result.to_json()["lossy"]) == (True, [], True)
    for wrong, words in (
        ({"memory": MemoryPreset.memo}, "codec=eight_bit_token: memory=memo makes tensors again"),
        ({"dtype": VerifyDtype.fp64}, "codecs take fp32 and bf16; set dtype=fp32"),
    ):
        with pytest.raises(InputError, match=words):
            run(folder, **{"dtype": VerifyDtype.fp32, "memory": MemoryPreset.keep, "codec": codec, **wrong})


def test_one_wrong_bit_in_what_a_tier_gives_back_is_reported(
    make_folder: MakeFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    complete_load = TierStack.complete_load

    def one_bit_off(self: TierStack, key: Any) -> torch.Tensor:
        comes_from_a_tier = self.state(key) is BlobState.loading
        tensor = complete_load(self, key)
        if comes_from_a_tier:
            tensor.view(torch.int64).flatten()[0] ^= 1
        return tensor

    monkeypatch.setattr(TierStack, "complete_load", one_bit_off)
    result = run(make_folder("llama", num_hidden_layers=4), memory=MemoryPreset.offload_host)
    assert result.bit_equal_to_keep is False
    assert result.max_rel_error <= 1e-11
    assert [f.split(":")[0] for f in result.failures()] == ["memory=offload_host"]


@pytest.mark.parametrize(
    ("family", "chunk_size", "fields"),
    [
        *((family, 7, {"documents": 3}) for family in FAMILIES),
        *(soak_unless(family == "llama", family, 33, {}) for family in FAMILIES),
        *(soak_unless(family == "mistral", family, 16, {"steps": 2}) for family in FAMILIES),
    ],
)
def test_chunks_have_the_gradients_of_transformers(
    make_folder: MakeFolder, family: str, chunk_size: int, fields: dict[str, Any]
) -> None:
    """fp64: ragged chunks, one chunk, two optimizer steps; two micro-batches of two rows each."""
    extra = {"sliding_window": 9} if family == "mistral" else {}
    folder = make_folder(family, **extra)
    memory = MemoryPreset.chunk_ssd if "documents" in fields else MemoryPreset.chunk
    result = run(folder, seq_len=33, batch=2, micro_batches=2, memory=memory, chunk_size=chunk_size, **fields)
    assert result.failures() == []
    assert result.max_rel_error <= 1e-11


@pytest.mark.parametrize(
    ("family", "memory", "chunk_size"),
    [
        *(soak_unless(family == "mistral", family, MemoryPreset.memo, None) for family in FAMILIES),
        *(soak_unless(family in ("qwen3", "mistral"), family, MemoryPreset.chunk_ssd, 7) for family in FAMILIES),
    ],
)
def test_responses_share_a_prompt(
    make_folder: MakeFolder, family: str, memory: MemoryPreset, chunk_size: int | None
) -> None:
    """Against every prompt with one response alone: two prompts in a row, rows of other lengths, any residence."""
    folder = make_folder(family, **({"sliding_window": 9} if family == "mistral" else {}))
    result = run(folder, memory=memory, chunk_size=chunk_size, micro_batches=2, **SHARED)
    assert result.failures() == []
    assert result.max_rel_error <= 1e-11
    assert result.bit_equal_to_keep


def test_responses_share_a_prompt_where_dynamic_rope_allows_it(make_folder: MakeFolder) -> None:
    """Up to the original length; beyond it every sequence would rotate the prompt in another way."""
    dynamic = {"rope_parameters": {"rope_type": "dynamic", "factor": 3.0}}
    folder = make_folder("llama", max_position_embeddings=33, **dynamic)
    assert run(folder, **SHARED).failures() == []
    with pytest.raises(InputError, match=r"have \d+ tokens: beyond 6 .*data\.share_prompts=false"):
        run(make_folder("llama", **DYNAMIC), **SHARED)


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        *(soak_unless(family in ("llama", "mistral"), family, VerifyDtype.fp32) for family in FAMILIES),
        *(soak_unless(family == "qwen3", family, VerifyDtype.bf16) for family in FAMILIES),
    ],
)
def test_chunks_err_as_much_as_whole_rows(make_folder: MakeFolder, family: str, dtype: VerifyDtype) -> None:
    result = run(make_folder(family), dtype=dtype, seq_len=48, memory=MemoryPreset.chunk_host, chunk_size=13)
    assert result.failures() == []


@pytest.mark.parametrize("dtype", list(VerifyDtype))
def test_parameters_without_a_true_gradient(make_folder: MakeFolder, dtype: VerifyDtype) -> None:
    """One token sees itself alone: softmax is 1 whatever q and k are, so their parameters have no gradient."""
    result = run(make_folder("qwen3"), seq_len=1, dtype=dtype)
    kinds = {name.split("self_attn.")[1] for name in result.noise_params}
    assert kinds == {"q_proj.weight", "k_proj.weight", "q_norm.weight", "k_norm.weight"}
    assert result.failures() == []
    assert set(result.noise_params) < set(result.params)


def test_a_gradient_where_there_should_be_none_fails(make_folder: MakeFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    run_decoder = ours.run_decoder

    def leaky(*args: Any) -> Any:
        (step,) = run_decoder(*args)
        step.grads["model.layers.0.self_attn.k_norm.weight"] += 1e-7
        return [step]

    monkeypatch.setattr(ours, "run_decoder", leaky)
    result = run(make_folder("qwen3"), seq_len=1)
    assert [failure.split(":")[0] for failure in result.failures()] == ["model.layers.0.self_attn.k_norm.weight"]


def test_json_is_whole_and_finite(make_folder: MakeFolder) -> None:
    values = run(make_folder("llama")).to_json()
    assert json.loads(json.dumps(values, allow_nan=False)) == values
    assert values["passed"] is True
    assert values["max_rel_error"] == max(values["params"].values())
    assert values["params"][values["max_rel_error_param"]] == values["max_rel_error"]
    assert {"model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight", "lm_head.weight"} < values[
        "params"
    ].keys()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(VerifyDtype))
@pytest.mark.parametrize("memory", ["keep", "recompute", "offload_host", "offload_ssd"])
def test_on_cuda(make_folder: MakeFolder, dtype: VerifyDtype, memory: str) -> None:
    folder = make_folder("qwen2", head_dim=64, hidden_size=256)
    fields = {"dtype": dtype, "memory": MemoryPreset(memory), "device": VerifyDevice.cuda}
    assert run(folder, seq_len=256, batch=2, documents=2, **fields).failures() == []


def test_cuda_that_is_not_there_is_refused(make_folder: MakeFolder) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(MachineError, match="device=cuda"):
        run(make_folder("llama"), device=VerifyDevice.cuda)


def test_our_fp64_run_casts_nothing_but_the_rope_table(
    make_folder: MakeFolder, narrow_tensors: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = VerifyConfig(hf=str(make_folder("qwen3")), seq_len=16, documents=2)
    model = ours.load_decoder(config, dtype=torch.float64, device=torch.device("cpu"))
    ((batch,),) = random_batches(config, 97, 0)
    tables = model.row_rope(batch.tokens, batch.packing, RowPart((0, 16), 16), torch.float64)
    monkeypatch.setattr(Decoder, "rope", lambda *_, **__: tables)
    handle = apply_memory(model.blocks, preset_plan(MemoryPreset.recompute, skeletons_of(model.blocks)))
    with narrow_tensors() as mode:
        handle.begin(0)
        model(batch.tokens, batch.targets, packing=batch.packing).backward()
        handle.end()
    handle.remove()
    assert mode.found == []
    monkeypatch.undo()
    with narrow_tensors() as mode:
        model(batch.tokens, batch.targets, packing=batch.packing)
    assert mode.found, "the watch sees the rope table"


def test_bad_input(make_folder: MakeFolder, tmp_path: Path) -> None:
    folder = make_folder("llama")
    for fields, words in (
        ({"seq_len": 0}, "seq_len=0"),
        ({"documents": 25}, "documents=25"),
        ({"documents": 5, "responses": 4}, "documents=5 with responses=4"),
        ({"responses": -1}, "responses=-1"),
        ({"seed": -1}, "seed=-1"),
        ({"lr": 0.0}, "lr=0.0"),
        ({"memory": MemoryPreset.auto}, "memory=auto"),
        ({"chunk_size": 8}, "chunk_size=8"),
        ({"chunk_size": 0, "memory": MemoryPreset.chunk}, "chunk_size=0"),
        ({"dtype": VerifyDtype.bf16, "steps": 2}, "steps=2"),
    ):
        with pytest.raises(InputError, match=words):
            run(folder, **fields)
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    for wrong in (tmp_path / "nowhere", tmp_path):  # the second has no weights
        with pytest.raises(InputError, check=has_id(ErrorId.model_folder_wrong)):
            run(wrong)


def test_a_length_beyond_the_models_warns(make_folder: MakeFolder) -> None:
    folder = make_folder("llama", max_position_embeddings=16)
    with pytest.warns(UserWarning, match="max_position_embeddings=16"):
        assert run(folder).failures() == []


@pytest.mark.parametrize(
    ("family", "degrees"),
    [
        ("qwen3", {"ulysses": 2, "memory": MemoryPreset.recompute}),
        ("qwen2", {"tensor": 2, "memory": MemoryPreset.memo}),
        pytest.param("llama", {"tensor": 2, "memory": MemoryPreset.ssdtrain, "responses": 3}, marks=pytest.mark.soak),
        pytest.param("qwen3", {"tensor": 2, "ring": 2, "memory": MemoryPreset.offload_host}, marks=pytest.mark.soak),
        pytest.param("mistral", {"tensor": 2, "ulysses": 2, "dtype": VerifyDtype.fp32}, marks=pytest.mark.soak),
        pytest.param("llama", {"tensor": 2, "dtype": VerifyDtype.bf16, "steps": 1}, marks=pytest.mark.soak),
        ("qwen3", {"pipeline": 2, "micro_batches": 3, "memory": MemoryPreset.offload_host}),
        ("qwen3", {"tensor": 2, "memory": MemoryPreset.chunk_host, "responses": 2}),
        pytest.param(
            "llama", {"ulysses": 2, "memory": MemoryPreset.chunk_ssd, "micro_batches": 2}, marks=pytest.mark.soak
        ),
        pytest.param("mistral", {"tensor": 2, "memory": MemoryPreset.chunk_auto}, marks=pytest.mark.soak),
        pytest.param("qwen2", {"tensor": 2, "ulysses": 2, "memory": MemoryPreset.chunk_host}, marks=pytest.mark.soak),
        pytest.param("qwen3", {"pipeline": 2, "micro_batches": 2, "tensor": 2}, marks=pytest.mark.soak),
        pytest.param("qwen2", {"tensor": 4}, marks=pytest.mark.soak),  # twice as many as the KV heads
        pytest.param("llama", {"pipeline": 2, "micro_batches": 2, "ring": 2}, marks=pytest.mark.soak),
        pytest.param(
            "qwen3",
            {
                "pipeline": 2,
                "pipeline_schedule": ZBV,
                "vocabulary": Vocabulary.vocab_2,
                "micro_batches": 4,
                "memory": MemoryPreset.offload_host,
            },
            marks=pytest.mark.soak,
        ),
        pytest.param("qwen2", {"ring": 2, "memory": MemoryPreset.memo}, marks=pytest.mark.soak),
        pytest.param("qwen3", {"ring": 2, "ulysses": 2, "responses": 3}, marks=pytest.mark.soak),
        pytest.param("llama", {"ring": 2, "ulysses": 2, "memory": MemoryPreset.offload_ssd}, marks=pytest.mark.soak),
        pytest.param("mistral", {"ring": 4, "dtype": VerifyDtype.fp32}, marks=pytest.mark.soak),
        pytest.param("llama", {"ulysses": 2, "dtype": VerifyDtype.bf16, "steps": 1}, marks=pytest.mark.soak),
    ],
)
def test_ranks_that_share_rows_or_blocks_compute_what_transformers_does(
    make_folder: MakeFolder, family: str, degrees: dict[str, Any]
) -> None:
    """The other ranks are started here. Two steps, two rows, packed documents."""
    shape = {"seq_len": 32, "batch": 2, "documents": 3, "steps": 2, **degrees}
    layers = {"num_hidden_layers": 4} if "pipeline_schedule" in degrees else {}
    result = run(make_folder(family, **layers), **shape)
    assert result.failures() == []
    assert result.bit_equal_to_keep is (True if "memory" in degrees else None)
    values = result.to_json()
    parallel = {name: degrees.get(name, 1) for name in ("tensor", "ulysses", "ring", "pipeline")}
    assert (values["ranks"], values["parallel"]) == (math.prod(parallel.values()), parallel)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"ulysses": 0}, "parallel.ulysses=0"),
        ({"tensor": 3, "seq_len": 33}, "parallel.tensor=3: does not divide model.num_heads=4, model.num_kv_heads=2"),
        ({"tensor": 2, "memory": MemoryPreset.chunk_sparse}, "memory=chunk_sparse: parallel.tensor=2.*chunk_host"),
        ({"tensor": 2, "memory": MemoryPreset.chunk, "chunk_size": 9}, "chunk_size=9: .* use 8 or 10"),
        ({"tensor": 2, "seq_len": 33}, "parallel.tensor x .*=2 cut it evenly; use 32 or 34"),
        ({"ring": 3, "seq_len": 32}, "seq_len=32.*use 30 or 33"),
        ({"ring": 2, "memory": MemoryPreset.chunk}, "memory=chunk: parallel.ring=2"),
        ({"ulysses": 2, "head_groups": 2}, "parallel.ulysses=2: head_groups=2"),
        ({"ulysses": 3, "seq_len": 33}, "parallel.ulysses=3.*4 heads"),
        ({"pipeline": 2, "micro_batches": 1}, "micro_batches=1: parallel.pipeline=2.*set micro_batches=2"),
        ({"pipeline_schedule": ZBV}, "parallel.pipeline_schedule=zbv: parallel.pipeline=1"),
        ({"pipeline": 2, "pipeline_schedule": ZBV, "micro_batches": 4}, "pipeline=2: 2 x 2 stages.*2 layers"),
        ({"pipeline": 9, "micro_batches": 9}, "parallel.pipeline=9.*layers"),
    ],
)
def test_degrees_that_do_not_fit_are_refused(make_folder: MakeFolder, values: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        run(make_folder("llama"), **values)
