"""Our decoder against transformers, in every precision, family and setting; then our decoder broken on purpose."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from headrace.helpers.tiers import has_id
from headrace.kernels.api import Packing
from headrace.kernels.attention import spec as spec_module
from headrace.storage.core.errors import ErrorId, InputError, MachineError
from headrace.storage.core.records import Direction
from headrace.storage.core.states import BlobState
from headrace.storage.stack import TierStack
from headrace.workers.memory.chunk_keys import ChunkKeys
from headrace.workers.memory.chunk_plan import KvShape, kv_bytes
from headrace.workers.memory.config import MemoryPreset
from headrace.workers.memory.policy import apply_memory, skeletons_of
from headrace.workers.memory.presets import PRESETS, preset_plan
from headrace.workers.memory.schedule import moved_bytes
from headrace.workers.model import decoder as decoder_module
from headrace.workers.model import dense as dense_module
from headrace.workers.model.config import ModelConfig
from headrace.workers.model.decoder import Decoder
from headrace.workers.model.dense import dense_program
from headrace.workers.model.hf import load_config
from headrace.workers.model.program import RowPart
from headrace.workers.model.skeleton import dense_skeleton
from headrace.workers.verify import ours
from headrace.workers.verify import verify as verify_module
from headrace.workers.verify.batches import random_batches
from headrace.workers.verify.config import VerifyConfig, VerifyDevice, VerifyDtype
from headrace.workers.verify.oracle import oracle_steps
from headrace.workers.verify.verify import BOUNDS, VerifyResult, verify

FAMILIES = ["llama", "qwen2", "qwen3", "mistral"]
DYNAMIC = {"rope_parameters": {"rope_type": "dynamic", "factor": 3.0}, "max_position_embeddings": 6}
YARN = {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 6}}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
MakeFolder = Callable[..., Path]
Mutant = Callable[[pytest.MonkeyPatch], None]


ORACLE_RUNS: dict[Any, Any] = {}


@pytest.fixture(autouse=True)
def oracle_runs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' side of equal comparisons is computed once: mutants break ours alone."""

    def remembered(folder: Any, oracle: Any, steps: Any, lr: float, device: torch.device) -> Any:
        parts = [
            (b.tokens.numpy().tobytes(), b.targets.numpy().tobytes(), b.packing.lengths, b.packing.parents)
            for step in steps
            for b in step
        ]
        key = (str(folder), oracle, lr, device, tuple(len(step) for step in steps), tuple(parts))
        if key not in ORACLE_RUNS:
            ORACLE_RUNS[key] = oracle_steps(folder, oracle, steps, lr, device)
        return ORACLE_RUNS[key]

    monkeypatch.setattr(verify_module, "oracle_steps", remembered)


def run(folder: Path, **fields: Any) -> VerifyResult:
    return verify(VerifyConfig(hf=str(folder), **{"seq_len": 24, "device": VerifyDevice.cpu, **fields}))


@pytest.mark.parametrize("family", FAMILIES)
def test_fp64_packed_documents_batch_two_micro_batches_two_steps(make_folder: MakeFolder, family: str) -> None:
    result = run(make_folder(family), batch=2, documents=3, micro_batches=2, steps=2, loss_tile=16)
    assert result.failures() == []
    assert result.loss_rel_error <= 1e-11
    assert result.max_rel_error <= 1e-11
    assert result.noise_params == ()


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("mistral", {"sliding_window": 5}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 0}),
        ("llama", {"rope_parameters": LLAMA3}),
        ("qwen3", {"rope_parameters": {"rope_type": "linear", "factor": 4.0}}),
        ("llama", DYNAMIC),
        ("qwen2", YARN),
        ("llama", {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 777.0}}),
        ("qwen2", {"tie_word_embeddings": False, "num_key_value_heads": 1}),
        ("qwen3", {"tie_word_embeddings": True, "num_key_value_heads": 4, "rms_norm_eps": 1e-3}),
    ],
    ids=[
        "window",
        "qwen_window",
        "llama3_rope",
        "linear_rope",
        "dynamic_rope",
        "yarn_rope",
        "tied_llama",
        "untied_qwen2",
        "tied_qwen3",
    ],
)
@pytest.mark.parametrize("documents", [1, 3])
def test_fp64_shapes(make_folder: MakeFolder, family: str, fields: dict[str, Any], documents: int) -> None:
    folder = make_folder(family, **fields)
    result = run(folder, seq_len=33, batch=2, documents=documents)
    assert result.failures() == []
    names = {"lm_head.weight"} & result.params.keys()
    assert bool(names) is not json.loads((folder / "config.json").read_text())["tie_word_embeddings"]


SHARED = {"seq_len": 33, "batch": 2, "documents": 2, "responses": 3}


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


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("chunk_size", "fields"), [(7, {"documents": 3}), (33, {}), (16, {"steps": 2})])
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


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("memory", "chunk_size"), [(MemoryPreset.memo, None), (MemoryPreset.chunk_ssd, 7)])
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


def of_other_parents(change: Callable[[int, int | None], int | None], owner: Any, name: str) -> Mutant:
    """A mutant that lets `owner.name(packing, ...)` see other parents."""

    def mutant(patch: pytest.MonkeyPatch) -> None:
        original = getattr(owner, name)

        def changed(packing: Packing, *args: Any) -> Any:
            parents = tuple(change(document, parent) for document, parent in enumerate(packing.parents))
            return original(replace(packing, parents=parents), *args)

        patch.setattr(owner, name, changed)

    return mutant


def last_response_only(patch: pytest.MonkeyPatch) -> None:
    """A prompt keeps the gradient that reaches it first, which is that of its last response."""
    add = ChunkKeys.add

    def mutant(self: ChunkKeys, layer: int, index: int, dk: torch.Tensor, dv: torch.Tensor) -> None:
        is_prompt = (index + 1) * self.block_len <= self.chunk.span[0]
        if not (is_prompt and (layer, index) in self.grads):
            add(self, layer, index, dk, dv)

    patch.setattr(ChunkKeys, "add", mutant)


SHARED_MUTANTS = {
    "sibling_seen": of_other_parents(lambda n, p: None if p is None else n - 1, spec_module, "readings_by_row"),
    "prompt_not_seen": of_other_parents(lambda n, p: None, spec_module, "readings_by_row"),
    "positions_from_zero": of_other_parents(lambda n, p: None, Packing, "positions"),
    "positions_run_on": of_other_parents(lambda n, p: None if p is None else n - 1, Packing, "positions"),
    "last_response_only": last_response_only,
}


@pytest.mark.parametrize(
    ("name", "fields"),
    [(name, {"memory": MemoryPreset.chunk, "chunk_size": 4}) for name in SHARED_MUTANTS]
    + [(name, {}) for name in SHARED_MUTANTS if name != "last_response_only"],  # that one is in the sweep by chunk
)
def test_mutants_of_shared_prompts_fail(
    make_folder: MakeFolder, monkeypatch: pytest.MonkeyPatch, name: str, fields: dict[str, Any]
) -> None:
    SHARED_MUTANTS[name](monkeypatch)
    result = run(make_folder("llama"), **fields, **SHARED)
    assert result.max_rel_error > 1e-3


@pytest.mark.parametrize("dtype", [VerifyDtype.fp32, VerifyDtype.bf16])
@pytest.mark.parametrize("family", FAMILIES)
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


# ---- mutants: our side broken on purpose -------------------------------------------------------------------------


def on_load(change: Callable[[Decoder], None]) -> Mutant:
    """A mutant that changes the decoder after its weights are loaded."""

    def mutant(patch: pytest.MonkeyPatch) -> None:
        load = ours.load_decoder

        def changed(*args: Any, **kwargs: Any) -> Decoder:
            model = load(*args, **kwargs)
            change(model)
            return model

        patch.setattr(ours, "load_decoder", changed)

    return mutant


def on_forward(change: Callable[..., Any]) -> Mutant:
    """A mutant that replaces Decoder.forward by change(forward, model, tokens, targets, packing, loss_tile)."""

    def mutant(patch: pytest.MonkeyPatch) -> None:
        forward = Decoder.forward

        def changed(self: Decoder, tokens: Any, targets: Any, *, packing: Any, loss_tile: int, each: bool) -> Any:
            assert not each, "a training pass takes the sum"
            return change(forward, self, tokens, targets, packing, loss_tile)

        patch.setattr(Decoder, "forward", changed)

    return mutant


def on_config(change: Callable[[ModelConfig], ModelConfig]) -> Mutant:
    """A mutant that reads the folder's configuration wrongly."""

    def mutant(patch: pytest.MonkeyPatch) -> None:
        load = ours.load_config
        patch.setattr(ours, "load_config", lambda folder: change(load(folder)))

    return mutant


def other_eps(config: ModelConfig) -> ModelConfig:
    return replace(config, rms_norm_eps=1.01 * config.rms_norm_eps)


def other_theta(model: Decoder) -> None:
    model.config = replace(model.config, rope_theta=model.config.rope_theta * 1.001)


def unscaled_rope(model: Decoder) -> None:
    model.config = replace(model.config, rope_scaling=None)


def no_attention_factor(model: Decoder) -> None:
    assert model.config.rope_scaling is not None
    model.config = replace(model.config, rope_scaling=replace(model.config.rope_scaling, attention_factor=1.0))


def length_of_the_row(patch: pytest.MonkeyPatch) -> None:
    rope = Decoder.rope

    def of_row(self: Decoder, positions: torch.Tensor, dtype: torch.dtype, **_: Any) -> Any:
        return rope(self, positions, dtype, lengths=(positions.shape[1],))

    patch.setattr(Decoder, "rope", of_row)


def no_key_bias(model: Decoder) -> None:
    with torch.no_grad():
        model.blocks[1].self_attn.k_proj.bias.zero_()  # type: ignore[union-attr]


def wider_window(config: ModelConfig) -> ModelConfig:
    assert config.sliding_window is not None
    return replace(config, sliding_window=config.sliding_window + 1)


def no_window(model: Decoder) -> None:
    config = replace(model.config, sliding_window=None)
    model.blocks[0].program = dense_program(config, model.operators)  # type: ignore[assignment]


def no_boundary(forward: Any, model: Any, tokens: Any, targets: Any, packing: Any, tile: int) -> Any:
    return forward(model, tokens, targets, packing=None, loss_tile=tile)


def unshifted(forward: Any, model: Any, tokens: Any, targets: Any, packing: Any, tile: int) -> Any:
    return forward(model, tokens, torch.where(targets == -100, targets, tokens), packing=packing, loss_tile=tile)


def shifted_twice(forward: Any, model: Any, tokens: Any, targets: Any, packing: Any, tile: int) -> Any:
    return forward(model, tokens, targets.roll(-1, 1), packing=packing, loss_tile=tile)


def positions_go_on(patch: pytest.MonkeyPatch) -> None:
    rope = Decoder.rope

    def run_on(self: Decoder, positions: torch.Tensor, dtype: torch.dtype, **rest: Any) -> Any:
        return rope(self, torch.arange(positions.shape[1])[None], dtype, **rest)

    patch.setattr(Decoder, "rope", run_on)


def fp32_norm(patch: pytest.MonkeyPatch) -> None:
    rms_norm = dense_module.rms_norm
    patch.setattr(dense_module, "rms_norm", lambda x, w, eps, **_: rms_norm(x.float(), w.float(), eps).to(x.dtype))


def fp64_rope_table(patch: pytest.MonkeyPatch) -> None:
    def tables(positions: Any, frequencies: Any, dtype: Any, scale: float) -> Any:
        angles = positions[..., None].double() * frequencies.double()
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos().to(dtype), angles.sin().to(dtype)

    patch.setattr(decoder_module, "rope_tables", tables)


def mean_per_tile(patch: pytest.MonkeyPatch) -> None:
    linear_cross_entropy = decoder_module.linear_cross_entropy

    def mutant(hidden: Any, weight: Any, targets: Any, *, options: Any, **others: Any) -> Any:
        tile = options.tokens_per_chunk
        hidden, targets = hidden.flatten(0, 1).split(tile), targets.flatten().split(tile)
        num_targets = sum((t != -100).sum() for t in targets)
        means = [
            linear_cross_entropy(h, weight, t, options=options, **others) / (t != -100).sum()
            for h, t in zip(hidden, targets, strict=True)
        ]
        return sum(means) / len(means) * num_targets

    patch.setattr(decoder_module, "linear_cross_entropy", mutant)


def mean_per_micro_batch(patch: pytest.MonkeyPatch) -> None:
    linear_cross_entropy = decoder_module.linear_cross_entropy

    def mutant(hidden: Any, weight: Any, targets: Any, **others: Any) -> Any:
        # what `sum / all targets` makes a mean of two means out of
        mean = linear_cross_entropy(hidden, weight, targets, **others) / (targets != -100).sum()
        return mean / 2 * mutant.num_targets  # type: ignore[attr-defined]

    def counted(*args: Any) -> Any:
        mutant.num_targets = sum(batch.num_targets for batch in args[2][0])  # type: ignore[attr-defined]
        return run_decoder(*args)

    run_decoder = ours.run_decoder
    patch.setattr(decoder_module, "linear_cross_entropy", mutant)
    patch.setattr(ours, "run_decoder", counted)


def head_without_gradient(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Decoder, "head_weight", property(lambda self: self.embed_tokens.weight.detach()))


WINDOW = {"sliding_window": 5}
MUTANTS: dict[str, tuple[str, dict[str, Any], Mutant]] = {
    "norm_eps": ("llama", {}, on_config(other_eps)),
    "norm_in_fp32": ("llama", {}, fp32_norm),
    "rope_theta": ("qwen3", {}, on_load(other_theta)),
    "rope_table_in_fp64": ("qwen3", {}, fp64_rope_table),
    "rope_not_scaled": ("llama", {"rope_parameters": LLAMA3}, on_load(unscaled_rope)),
    "yarn_attention_factor": ("llama", YARN, on_load(no_attention_factor)),
    "dynamic_length_of_the_row": ("llama", DYNAMIC, length_of_the_row),
    "bias_missing": ("qwen2", {}, on_load(no_key_bias)),
    "document_boundary_dropped": ("llama", {}, on_forward(no_boundary)),
    "positions_run_on": ("mistral", {}, positions_go_on),
    "labels_not_shifted": ("llama", {}, on_forward(unshifted)),
    "labels_shifted_twice": ("llama", {}, on_forward(shifted_twice)),
    "mean_per_tile": ("llama", {}, mean_per_tile),
    "mean_per_micro_batch": ("qwen2", {}, mean_per_micro_batch),
    "window_one_wider": ("mistral", WINDOW, on_config(wider_window)),
    "window_missing_in_a_layer": ("mistral", WINDOW, on_load(no_window)),
    "tied_head_without_gradient": ("qwen2", {}, head_without_gradient),
}
# What changes nothing, or less than the precision resolves.
BELOW_FP32 = ("norm_eps", "norm_in_fp32", "rope_table_in_fp64", "positions_run_on")
BELOW_BF16 = (*BELOW_FP32, "rope_theta")
# bf16 takes a CPU seconds: of the others the long form.
SHORT_BF16 = ("bias_missing", "document_boundary_dropped", "mean_per_tile", "window_one_wider")


def soak_unless(short: bool, *values: Any) -> Any:
    return pytest.param(*values, marks=() if short else pytest.mark.soak)


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_fail_in_fp64(make_folder: MakeFolder, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    family, fields, mutant = MUTANTS[name]
    folder = make_folder(family, **fields)
    wanted = {"batch": 2, "documents": 3, "micro_batches": 2, "loss_tile": 16}
    assert run(folder, **wanted).failures() == []
    mutant(monkeypatch)
    result = run(folder, **wanted)
    assert result.failures()
    assert max(result.loss_rel_error, result.max_rel_error) > 10 * BOUNDS[VerifyDtype.fp64]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, VerifyDtype.fp32) for name in MUTANTS if name not in BELOW_FP32]
    + [soak_unless(name in SHORT_BF16, name, VerifyDtype.bf16) for name in MUTANTS if name not in BELOW_BF16],
)
def test_mutants_fail_in_lower_precision(
    make_folder: MakeFolder, monkeypatch: pytest.MonkeyPatch, name: str, dtype: VerifyDtype
) -> None:
    family, fields, mutant = MUTANTS[name]
    mutant(monkeypatch)
    folder = make_folder(family, **fields)
    assert run(folder, batch=2, documents=3, micro_batches=2, loss_tile=16, dtype=dtype).failures()


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
