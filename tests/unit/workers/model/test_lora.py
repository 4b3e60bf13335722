"""LoRA: PEFT's gradients and files, equal bits for every plan, what a frozen trunk costs, mutants."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from headrace.helpers import tiny_models
from headrace.helpers.live_bytes import LiveBytes
from headrace.storage.core.errors import InputError
from headrace.workers.memory.plan import Cuts, LayerPlan, MemoryPlan, Residence, Stretch, keep_layer
from headrace.workers.memory.policy import apply_memory, skeletons_of
from headrace.workers.model import lora
from headrace.workers.model.adapter import block_skeleton, num_adapter_params
from headrace.workers.model.config import PROJECTIONS, AdapterConfig, AdapterKind, Family
from headrace.workers.model.decoder import Decoder, initial_weights
from headrace.workers.model.hf import hf_name, load_config, load_weights, save_pretrained
from headrace.workers.model.lora import LoraRule, is_adapter
from headrace.workers.model.peft_config import ADAPTER_CONFIG, read_adapter_config
from headrace.workers.model.peft_files import iter_adapter, iter_merged, peft_name, save_adapter
from headrace.workers.model.sharded import copy_weights
from headrace.workers.model.skeleton import Kind, dense_skeleton
from headrace.workers.telemetry.flops import step_flops
from headrace.workers.verify.oracle import Oracle, load_oracle

LLAMA = replace(tiny_models.LLAMA, num_layers=2)
LORA = AdapterConfig(kind=AdapterKind.lora, rank=4, alpha=12.0)
DROPPED = replace(LORA, dropout=0.3)
SOME = replace(LORA, targets="q_proj,v_proj,down_proj", rank=3)
SEQ_LEN, TILE, STEP, SEED, ROW = 29, 8, 5, 11, 6
CUTS, CPU = Cuts(TILE), torch.device("cpu")


def decoder(adapter: AdapterConfig, dtype: torch.dtype, qk_norm: bool = False) -> Decoder:
    """The same weights for every adapter of the same shapes."""
    config = replace(LLAMA, family=Family.qwen3, qk_norm=True, head_dim=8) if qk_norm else LLAMA
    model = Decoder(config, dtype=dtype, adapter=adapter)
    torch.manual_seed(0)
    for param in model.parameters():
        nn.init.normal_(param, std=0.3)
    return model


def gradients(
    model: Decoder, layer: Callable[[Any], LayerPlan] | None, cuts: Cuts = CUTS, *, num: int = 1
) -> list[torch.Tensor]:
    """The losses of `num` micro-batches and the gradients of everything trained; None: by autograd."""
    model.zero_grad()
    seen: list[torch.Tensor] = []
    handle = None
    if layer is not None:
        rows = tuple(layer(skeleton) for skeleton in skeletons_of(model.blocks))
        handle = apply_memory(model.blocks, MemoryPlan("p", rows, cuts=cuts))
    try:
        for micro_batch in range(num):
            if handle is not None:
                handle.begin(STEP, micro_batch, seed=SEED, row=ROW + 2 * micro_batch)
            draw = torch.Generator().manual_seed(micro_batch)
            tokens = torch.randint(0, 50, (2, SEQ_LEN), generator=draw)
            loss = model(tokens, tokens.roll(-1, 1), loss_tile=16)
            loss.backward()
            seen.append(loss.detach())
    finally:
        if handle is not None:
            handle.remove()
    return [*seen, *(p.grad for p in model.parameters() if p.grad is not None)]


def input_only(skeleton: Any) -> LayerPlan:
    return LayerPlan.of(x=Residence.hbm)


def front_again(skeleton: Any) -> LayerPlan:
    """The front of every tensor but the input is computed again."""
    row = (Stretch(0, 2 * TILE, Residence.recompute), Stretch(2 * TILE, None, Residence.hbm))
    held = {name: row for name in skeleton.skeletal if name not in ("x", "out", "lse")}
    return LayerPlan({**held, "x": (Stretch(0, None, Residence.hbm),)})


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def worst(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> float:
    return max(float((a - b).norm() / b.norm()) for a, b in zip(ours, theirs, strict=True))


# --- against PEFT


def peft_model(folder: Path, adapter: AdapterConfig) -> Any:
    """The fp64 oracle of a folder with PEFT's adapters on it, all of them away from zero."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        target_modules=list(adapter.projections),
        lora_dropout=adapter.dropout,
        bias="none",
        task_type="CAUSAL_LM",
    )
    model = peft.get_peft_model(load_oracle(folder, Oracle.fp64, torch.device("cpu")), config).double()
    torch.manual_seed(1)
    for name, param in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(param, std=0.3)
    return model.eval()


@pytest.mark.parametrize("adapter", [LORA, SOME], ids=["all", "some"])
def test_loss_and_gradients_are_those_of_peft(case: str, adapter: AdapterConfig, hf_folder, tmp_path) -> None:
    """fp64, every family; PEFT's own files are the way over, so what it saves loads here."""
    folder = hf_folder(case)
    theirs = peft_model(folder, adapter)
    tokens = torch.randint(0, 97, (2, 27), generator=torch.Generator().manual_seed(3))
    logits = theirs(input_ids=tokens, use_cache=False).logits
    reference = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")
    reference.backward()
    theirs.save_pretrained(tmp_path)

    read = read_adapter_config(tmp_path)
    assert (read.rank, read.alpha, read.projections) == (adapter.rank, adapter.alpha, adapter.projections)
    model = Decoder(load_config(folder), dtype=torch.float64, adapter=read)
    load_weights(model, folder)
    copy_weights(model, iter_adapter(tmp_path, model.config, read))
    targets = tokens.roll(-1, 1)
    targets[:, -1] = -100
    expected = {name.replace(".default.", "."): p.grad for name, p in theirs.named_parameters() if "lora_" in name}
    for layer in (keep_layer, input_only):
        model.zero_grad()
        rows = tuple(layer(skeleton) for skeleton in skeletons_of(model.blocks))
        handle = apply_memory(model.blocks, MemoryPlan("p", rows, cuts=Cuts(TILE)))
        handle.begin(0)
        loss = model(tokens, targets, loss_tile=16)
        loss.backward()
        handle.remove()
        assert abs(float(loss.detach() / reference.detach()) - 1) <= 1e-11
        found = {peft_name(name): p.grad for name, p in model.named_parameters() if p.requires_grad}
        assert found.keys() == expected.keys()
        assert worst(list(found.values()), [expected[name] for name in found]) <= 1e-11
        assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


@pytest.mark.parametrize("case_", ["llama", "qwen2 tied", "qwen3"])
def test_what_is_exported_loads_in_peft_and_merged_in_transformers(case_: str, hf_folder, tmp_path) -> None:
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    folder, adapter = hf_folder(case_), SOME
    config = load_config(folder)
    model = Decoder(config, adapter=adapter).eval()
    load_weights(model, folder)
    torch.manual_seed(2)
    adapters = {n: p.data.normal_(std=0.3) for n, p in model.named_parameters() if is_adapter(n)}
    trunk = {n: p.data for n, p in model.named_parameters() if not is_adapter(n)}
    save_adapter(adapters.items(), adapter, tmp_path / "adapter", trunk=str(folder))
    save_pretrained(iter_merged(trunk.items(), adapters.items(), adapter), config, tmp_path / "merged")

    tokens = torch.randint(0, 97, (2, 19), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        ours = model(tokens)
        base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
        added = theirs(input_ids=tokens).logits
        merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
        plain = merged(input_ids=tokens).logits
        with theirs.disable_adapter():
            trunk_alone = theirs(input_ids=tokens).logits
    assert worst([ours, plain], [added, added]) <= 5e-6
    assert worst([trunk_alone], [added]) > 0.1


def test_our_files_are_read_back_as_they_were_written(tmp_path) -> None:
    model = decoder(SOME, torch.float32)
    state = {name: param.data for name, param in model.named_parameters() if is_adapter(name)}
    save_adapter(state.items(), SOME, tmp_path / "a", trunk=None, dtype=torch.float32)
    read = read_adapter_config(tmp_path / "a")
    assert replace(read, init_from=None) == SOME
    assert {n: t.tolist() for n, t in iter_adapter(tmp_path / "a", LLAMA, read)} == {
        n: t.tolist() for n, t in state.items()
    }
    with pytest.raises(InputError, match=r"lora_A.*has shape .*the run wants"):
        iter_adapter(tmp_path / "a", replace(LLAMA, hidden_size=32), read)
    with pytest.raises(InputError, match="is not part of the adapter"):
        iter_adapter(tmp_path / "a", LLAMA, replace(read, targets="q_proj"))
    with pytest.raises(InputError, match="exists already"):
        save_adapter(state.items(), SOME, tmp_path / "a", trunk=None)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("peft_type", "IA3", "LORA is"),
        ("bias", "all", "bias=none"),
        ("use_dora", True, "without it"),
        ("use_rslora", True, "without it"),
        ("rank_pattern", {"q_proj": 2}, "without it"),
        ("modules_to_save", ["lm_head"], "without it"),
        ("layers_to_transform", [0], "without it"),
        ("init_lora_weights", "pissa", "own weights"),
        ("a_key_of_tomorrow", 1, "without it"),
        ("r", 0, "from 1"),
        ("lora_alpha", "much", "a number"),
        ("target_modules", ["lm_head"], "some of q_proj"),
        ("target_modules", ".*attn.*", "some of q_proj"),
    ],
)
def test_an_adapter_that_is_not_computed_here_is_refused(key: str, value: object, words: str, tmp_path) -> None:
    good = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "use_dora": False}
    path = tmp_path / ADAPTER_CONFIG
    path.write_text(json.dumps(good))
    assert read_adapter_config(tmp_path).targets == "q_proj"
    path.write_text(json.dumps({**good, key: value}))
    with pytest.raises(InputError, match=words) as error:
        read_adapter_config(tmp_path)
    assert str(path) in str(error.value)
    assert f"{key}={json.dumps(value)}" in str(error.value)


# --- plans, dropout, mutants


@pytest.mark.parametrize("adapter", [LORA, DROPPED, SOME, replace(SOME, dropout=0.5)], ids=str)
@pytest.mark.parametrize("qk_norm", [False, True])
def test_no_plan_changes_a_bit(adapter: AdapterConfig, qk_norm: bool) -> None:
    model = decoder(adapter, torch.float32, qk_norm)
    right = gradients(model, keep_layer)
    assert len(right) == 1 + sum(param.requires_grad for param in model.parameters())
    assert equal(gradients(model, input_only), right)
    assert equal(gradients(model, front_again), right)


@pytest.mark.parametrize("cuts", [Cuts(TILE), Cuts(64)], ids=str)
def test_the_gradients_are_those_of_autograd(cuts: Cuts) -> None:
    model = decoder(LORA, torch.float64)
    assert worst(gradients(model, keep_layer, cuts), gradients(model, None)) <= 1e-12


class Masked(nn.Module):
    """x -> dropout(x) with the masks of the pass, for autograd: those of whole rows."""

    def __init__(self, layer: int, projection: str, dropout: float) -> None:
        super().__init__()
        self.place, self.dropout, self.row = (SEED, STEP, layer, PROJECTIONS.index(projection)), dropout, ROW

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        size = lora.MASK_TOKENS
        drawn = [
            [lora._drawn((*self.place, self.row + i, t), x.shape[2], CPU) for t in range(0, x.shape[1], size)]
            for i in range(len(x))
        ]
        self.row += len(x)
        rows = torch.stack([torch.cat(row)[: x.shape[1]] for row in drawn])
        return x * (rows >= self.dropout) / (1 - self.dropout)


@pytest.mark.parametrize("mask_tokens", [6, 128])
def test_dropout_is_that_of_autograd_with_the_same_masks(mask_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 8 tokens cross the borders of what is drawn at once, and lie within it."""
    monkeypatch.setattr(lora, "MASK_TOKENS", mask_tokens)
    model, plain = decoder(DROPPED, torch.float64), Decoder(LLAMA, dtype=torch.float64, adapter=LORA)
    plain.load_state_dict(model.state_dict())
    for layer, block in enumerate(plain.blocks):
        for name, module in list(block.named_modules()):
            leaf = name.rpartition(".")[2]
            if leaf in PROJECTIONS:
                module.lora_A = nn.Sequential(Masked(layer, leaf, DROPPED.dropout), module.lora_A)
    assert worst(gradients(model, keep_layer, num=2), gradients(plain, None, num=2)) <= 1e-12
    kept = lora._drawn((3, 0), 1000, CPU) >= DROPPED.dropout
    assert float(kept.double().mean()) == pytest.approx(0.7, abs=0.01)


def test_masks_follow_the_step_the_row_and_the_seed() -> None:
    model = decoder(DROPPED, torch.float32)

    def loss(**begin: int) -> float:
        handle = apply_memory(model.blocks, MemoryPlan("p", (LayerPlan.of(x=Residence.hbm),) * 2, cuts=Cuts(TILE)))
        handle.begin(begin.pop("step", 0), **begin)
        tokens = torch.arange(SEQ_LEN)[None]
        found = float(model(tokens, tokens, loss_tile=16).detach())
        handle.remove()
        return found

    first = loss(seed=1, row=2)
    assert loss(seed=1, row=2) == first
    assert len({first, loss(seed=2, row=2), loss(seed=1, row=3), loss(step=1, seed=1, row=2)}) == 4


def test_a_plain_block_refuses_dropout_in_training_and_leaves_it_out_in_evaluation() -> None:
    model, without = decoder(DROPPED, torch.float32), decoder(LORA, torch.float32)
    tokens = torch.arange(9)[None]
    with pytest.raises(RuntimeError, match=r"adapter\.dropout"):
        model(tokens)
    model.eval()
    assert torch.equal(model(tokens), without(tokens))
    model.train()


def scale_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AdapterConfig, "scale", property(lambda self: 1.0))


def swapped(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradients of A and B are made from each other's factors: dA from x alone, as if B were the identity."""
    right = LoraRule.grad_weight

    def grad_weight(self: LoraRule, params: Any, x: Any, grads: Any, sums: Any, at: Any) -> None:
        other = {**params}
        for pair in self.adapters:
            if pair is not None:
                a, b = pair
                other[a], other[b] = params[b].t()[:, :1].expand_as(params[a]), params[a].t()[:1].expand_as(params[b])
        right(self, other, x, grads, sums, at)

    monkeypatch.setattr(LoraRule, "grad_weight", grad_weight)


@pytest.mark.parametrize("mutant", [scale_dropped, swapped])
def test_mutants_are_not_the_gradients_of_autograd(mutant: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = decoder(LORA, torch.float64)
    right = gradients(model, None)
    assert worst(gradients(model, keep_layer), right) <= 1e-12
    mutant(monkeypatch)
    fresh = Decoder(LLAMA, dtype=torch.float64, adapter=LORA)
    fresh.load_state_dict(model.state_dict())
    assert worst(gradients(fresh, keep_layer), right) > 1e-3


def test_mutant_a_mask_that_is_drawn_anew_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    model = decoder(DROPPED, torch.float32)
    right = gradients(model, keep_layer)
    monkeypatch.setattr(LoraRule, "_dropped", lambda self, x, *at, out=None: F.dropout(x, self.dropout, training=True))
    assert not equal(gradients(model, keep_layer), gradients(model, input_only))
    monkeypatch.undo()
    assert equal(gradients(model, input_only), right)


# --- what a frozen trunk costs


def test_a_frozen_segment_without_an_adapter_needs_no_value() -> None:
    """And `keep` holds nothing that no gradient takes, whatever the targets."""
    for targets in PROJECTIONS:
        skeleton = block_skeleton(LLAMA, replace(LORA, targets=targets))
        assert keep_layer(skeleton).stretches.keys() <= skeleton.wanted
    full, lora = block_skeleton(LLAMA), block_skeleton(LLAMA, SOME)
    needs = {segment.name: segment.needs for segment in lora.segments if segment.kind is Kind.linear}
    assert needs == {"qkv": ("n1",), "o": (), "gate_up": (), "down": ("act",)}
    assert full.wanted - lora.wanted == {"n2"}
    none = block_skeleton(LLAMA, replace(SOME, targets="o_proj"))
    assert full.wanted - none.wanted == {"n1", "n2", "act"}
    assert num_adapter_params(LLAMA, SOME) == 2 * 3 * ((16 + 16) + (16 + 8) + (24 + 16))
    counted = sum(p.numel() for p in decoder(SOME, torch.float32).parameters() if p.requires_grad)
    assert counted == num_adapter_params(LLAMA, SOME)


def peak_of_a_step(adapter: AdapterConfig, num_tokens: int) -> int:
    """All live tensors of a step under `keep`: also weights, gradients and AdamW's moments."""
    model = Decoder(replace(LLAMA, hidden_size=128, intermediate_size=384, vocab_size=500), adapter=adapter)
    model.init_weights(0)
    trained = [param for param in model.parameters() if param.requires_grad]
    optimizer = torch.optim.AdamW(trained, foreach=False)
    for param in trained:
        param.grad = torch.zeros_like(param)
    optimizer.step()
    optimizer.zero_grad()
    there = [*model.parameters(), *(tensor for state in optimizer.state.values() for tensor in state.values())]
    rows = tuple(keep_layer(skeleton) for skeleton in skeletons_of(model.blocks))
    handle = apply_memory(model.blocks, MemoryPlan("p", rows, cuts=Cuts(64)), norm=model.norm)
    tokens = torch.arange(num_tokens)[None] % 500
    handle.begin(0)
    with LiveBytes([*there, tokens]) as live:
        model(tokens, tokens, loss_tile=16).backward()
        optimizer.step()
    handle.end()
    return live.peak + sum(tensor.nbytes for tensor in there)


def test_live_tensors_of_a_step_where_weights_weigh_most_and_where_activations_do() -> None:
    few, many = (peak_of_a_step(LORA, num) / peak_of_a_step(AdapterConfig(), num) for num in (32, 2048))
    assert few <= 0.6
    # Norms, attention and activation need the same values for their inputs' gradients, frozen or not.
    assert keep_layer(block_skeleton(LLAMA, LORA)) == keep_layer(block_skeleton(LLAMA))
    assert 0.6 < many < 1


def test_model_flops_leave_the_frozen_gradients_out() -> None:
    full, lora = (step_flops(LLAMA, [SEQ_LEN], causal=True, adapter=a) for a in (AdapterConfig(), LORA))
    products = 2 * SEQ_LEN * (16 * (2 * 16 + 2 * 8 + 3 * 24))
    saved = 2 * products + 2 * SEQ_LEN * 16 * 50
    adapters = 3 * 2 * SEQ_LEN * num_adapter_params(LLAMA, LORA)
    assert full - lora == saved - adapters


def test_first_values_are_a_function_of_seed_and_name() -> None:
    found = dict(initial_weights(LLAMA, 3, adapter=LORA))
    again = dict(initial_weights(LLAMA, 3, adapter=replace(LORA, targets="o_proj")))
    trunk = dict(initial_weights(LLAMA, 3))
    assert all(torch.equal(found[name], trunk[name]) for name in trunk)
    assert all(torch.equal(found[name], again[name]) for name in again)
    a = found["blocks.1.mlp.down_proj.lora_A.weight"]
    assert not any(found[name].any() for name in found if "lora_B" in name)
    assert float(a.abs().max()) <= 24**-0.5
    assert float(a.std()) == pytest.approx(24**-0.5 / 3**0.5, rel=0.2)
    assert not torch.equal(a, dict(initial_weights(LLAMA, 4, adapter=LORA))["blocks.1.mlp.down_proj.lora_A.weight"])
    assert hf_name("blocks.1.mlp.down_proj.lora_A.weight") == "model.layers.1.mlp.down_proj.lora_A.weight"


def test_any_linear_segment_takes_an_adapter() -> None:
    for name in PROJECTIONS:
        model = decoder(replace(LORA, targets=name), torch.float64)
        assert sum(param.requires_grad for param in model.parameters()) == 2 * LLAMA.num_layers
        assert worst(gradients(model, input_only), gradients(model, None)) <= 1e-12
    assert {n for s in dense_skeleton(LLAMA).segments for n in s.projections} == set(PROJECTIONS)
