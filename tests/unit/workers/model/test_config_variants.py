"""Every key of config.json that changes the maths: the logits are transformers' in fp64, or the file is refused.

`pytest -s` prints the table of cases.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from headrace.helpers.tiers import has_id
from headrace.storage.core.errors import ErrorId, InputError
from headrace.workers.model.config import Family, RopeScaling, RopeType
from headrace.workers.model.decoder import Decoder
from headrace.workers.model.generation import SamplingConfig, generate
from headrace.workers.model.hf import load_weights
from headrace.workers.model.hf_config import config_to_hf, load_config
from headrace.workers.verify.oracle import InputDtypeRMSNorm

ORIGINAL = 16  # tokens; the sequences below are longer and shorter
BASE: dict[str, Any] = {
    "vocab_size": 41,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 40,
    "max_position_embeddings": ORIGINAL,
    "initializer_range": 0.3,
    "head_dim": 8,
}
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": ORIGINAL}
TABLES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "linear whole": {"rope_type": "linear", "factor": 3},
    "dynamic": {"rope_type": "dynamic", "factor": 2.5},
    "dynamic original": {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 8},
    "llama3": LLAMA3,
    "llama3 original": {**LLAMA3, "original_max_position_embeddings": 9},
    "yarn": YARN,
    "yarn at max": {"rope_type": "yarn", "factor": 4.0},
    "yarn below one": {**YARN, "factor": 0.5},
    "yarn null factor": {**YARN, "factor": None, "original_max_position_embeddings": 4},
    "yarn attention": {**YARN, "attention_factor": 1.7},
    "yarn betas": {**YARN, "beta_fast": 9.0, "beta_slow": 0.5},
    "yarn null betas": {**YARN, "beta_fast": None, "beta_slow": None},
    "yarn mscale": {**YARN, "mscale": 1.3, "mscale_all_dim": 0.7},
    "yarn mscale alone": {**YARN, "mscale": 1.3},
    "yarn no truncate": {**YARN, "truncate": False, "original_max_position_embeddings": 64},
    "longrope": {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "factor": 2.0},
    "unknown": {"rope_type": "spiral"},
    "null type": {"rope_type": None},
    "no factor": {"rope_type": "linear"},
    "nan factor": {"rope_type": "linear", "factor": float("nan")},
    "partial": {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5},
    "per layer type": {"full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 100.0}},
}
KEYS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "theta": {"rope_theta": 500.0},
    "theta whole": {"rope_theta": 500},
    "theta null": {"rope_theta": None},
    "theta twice": {"rope_theta": 500.0, "rope_parameters": {"rope_type": "default", "rope_theta": 90.0}},
    "two tables": {"rope_scaling": TABLES["linear"], "rope_parameters": {**YARN, "rope_theta": 90.0}},
    "empty scaling": {"rope_scaling": {}, "rope_parameters": {**YARN, "rope_theta": 90.0}},
    "null scaling": {"rope_scaling": None, "rope_parameters": None, "rope_theta": 77.0},
    "original beside": {"original_max_position_embeddings": 6, "rope_scaling": YARN},
    "original beside, llama3": {"original_max_position_embeddings": 6, "rope_scaling": LLAMA3},
    "original beside, dynamic": {"original_max_position_embeddings": 6, "rope_scaling": TABLES["dynamic"]},
    "partial beside": {"partial_rotary_factor": 0.5},
    "partial null": {"partial_rotary_factor": None},
    "window": {"sliding_window": 5},
    "window null": {"sliding_window": None},
    "window used": {"sliding_window": 5, "use_sliding_window": True, "max_window_layers": 0},
    "window used, one layer": {"sliding_window": 5, "use_sliding_window": True, "max_window_layers": 1},
    "window used, no layer": {"sliding_window": 5, "use_sliding_window": True, "max_window_layers": 2},
    "window used, null": {"sliding_window": None, "use_sliding_window": True, "max_window_layers": 0},
    "window unused": {"sliding_window": 5, "use_sliding_window": False, "max_window_layers": 0},
    "use as text": {"sliding_window": 5, "use_sliding_window": "false", "max_window_layers": 0},
    **{
        f"layers {name}{' used' if used else ''}": {
            "layer_types": types,
            "sliding_window": 5,
            "use_sliding_window": used,
        }
        for used in (False, True)
        for name, types in {
            "full": ["full_attention"] * 2,
            "sliding": ["sliding_attention"] * 2,
            "mixed": ["sliding_attention", "full_attention"],
            "short": ["full_attention"],
            "chunked": ["chunked_attention"] * 2,
            "null": None,
        }.items()
    },
    "attention bias": {"attention_bias": True},
    "mlp bias": {"mlp_bias": True},
    "gelu": {"hidden_act": "gelu"},
    "swish": {"hidden_act": "swish"},
    "tied": {"tie_word_embeddings": True},
    "tied as text": {"tie_word_embeddings": "false"},
    "eps": {"rms_norm_eps": 1e-2},
    "no head_dim": {"head_dim": ...},
    "wide heads": {"head_dim": 12},
    "no kv heads": {"num_key_value_heads": None},
    "kv heads missing": {"num_key_value_heads": ..., "num_attention_heads": 8, "head_dim": 4},
    "eps missing": {"rms_norm_eps": ...},
    "positions missing": {"max_position_embeddings": ..., "rope_scaling": {**LLAMA3, "factor": 8.0}},
    "pad": {"pad_token_id": 3},
    "pad -1": {"pad_token_id": -1},
    "pad beyond": {"pad_token_id": 99},
    "dropout": {"attention_dropout": 0.5},
    "tensor parallel": {"pretraining_tp": 2},
    "quantised": {"quantization_config": {"quant_method": "fp8"}},
    "other class": {"architectures": ["LlamaForSequenceClassification"]},
    "per layer": {"per_layer_config": {"0": {"intermediate_size": 16}}},
}


def variants() -> dict[str, dict[str, Any]]:
    """Every case by name."""
    found = {}
    for family in (member.value for member in Family):
        start = {"model_type": family, **BASE}
        if family == "mistral":
            start["sliding_window"] = None
        for name, keys in KEYS.items():
            found[f"{family}, {name}"] = {**start, **keys}
        # Where the table stands is read before the family is looked at: one family takes it in every place.
        for name, table in TABLES.items():
            old = {("type" if key == "rope_type" else key): value for key, value in table.items()}
            spelt = {
                "rope_scaling": {"rope_scaling": table, "rope_theta": 300.0},
                "rope_scaling, type": {"rope_scaling": old, "rope_theta": 300.0},
                "rope_parameters": {"rope_parameters": {**table, "rope_theta": 300.0}},
                "rope_parameters, theta beside": {"rope_parameters": table, "rope_theta": 300.0},
            }
            for place, keys in spelt.items() if family == "llama" else [("rope_parameters", spelt["rope_parameters"])]:
                found[f"{family}, {name} in {place}"] = {**start, **keys}
    return {name: {key: value for key, value in keys.items() if value is not ...} for name, keys in found.items()}


VARIANTS = variants()
OUTCOMES: Counter[tuple[str, str]] = Counter()


@pytest.fixture(scope="module", autouse=True)
def table() -> Iterator[None]:
    """Print what came of all cases."""
    yield
    print(f"\n{'family':<10}{'equal':>8}{'refused':>10}")
    for family in Family:
        print(f"{family.value:<10}{OUTCOMES[family.value, 'equal']:>8}{OUTCOMES[family.value, 'refused']:>10}")
    print(f"{sum(OUTCOMES.values())} cases")


def oracle(folder: Path) -> Any:
    """transformers' model of a folder in fp64 with its norms in fp64. A folder without weights gets random ones."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    path = folder / "model.safetensors"
    if path.exists():
        missing, unexpected = model.load_state_dict(load_file(path), strict=False)
        model.tie_weights()
        assert not unexpected
        assert set(missing) <= {"lm_head.weight"}, "but a tied head"
    else:
        with torch.no_grad():
            for name, param in model.named_parameters():
                if name.endswith(("bias", "norm.weight")):
                    param.add_(0.3 * torch.randn_like(param))
        save_file({name: param.detach() for name, param in model.named_parameters()}, path)
    model = model.eval().double()
    for name, norm in [(n, m) for n, m in model.named_modules() if type(m).__name__.endswith("RMSNorm")]:
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, InputDtypeRMSNorm(norm))
    return model


def written(folder: Path, keys: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(keys))
    return folder


def loss_and_gradients(model: Any, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits, and the gradient of their weighted sum with respect to the embedding."""
    out = model(tokens)
    logits = getattr(out, "logits", out)
    weights = torch.randn(logits.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    model.zero_grad()
    (logits * weights).sum().backward()
    inner = getattr(model, "model", model)
    return logits.detach(), inner.embed_tokens.weight.grad.clone()


def same_table(scaling: RopeScaling | None) -> RopeScaling | None:
    """With the attention factor spelt out, as the export does."""
    return (
        replace(scaling, attention_factor=scaling.table_scale) if scaling and scaling.type is RopeType.yarn else scaling
    )


def is_long_form(name: str) -> bool:
    """Where the table stands is read alike for all tables: of most, one place will do."""
    table, _, place = name.partition(", ")[2].partition(" in ")
    return place not in ("", "rope_parameters") and table not in ("linear", "dynamic", "llama3 original", "yarn betas")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.soak if is_long_form(name) else ()) for name in VARIANTS]
)
def test_equal_or_refused(name: str, tmp_path: Path) -> None:
    folder = written(tmp_path / "model", VARIANTS[name])
    family = name.partition(",")[0]
    try:
        config = load_config(folder)
    except InputError:
        OUTCOMES[family, "refused"] += 1
        return
    theirs = oracle(folder)
    ours = Decoder(config, dtype=torch.float64)
    load_weights(ours, folder)
    # What is written is read to the same model, here and by transformers.
    again = written(tmp_path / "again", config_to_hf(config, "float32"))
    (again / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    assert replace(load_config(again), head_dim=config.head_size) == replace(
        config, name="again", head_dim=config.head_size, rope_scaling=same_table(config.rope_scaling)
    )
    reread = oracle(again)
    assert type(reread) is type(theirs)
    # Ascending, because transformers' dynamic scaling remembers the longest sequence so far.
    for length in (ORIGINAL - 3, ORIGINAL, 2 * ORIGINAL + 5):
        tokens = torch.randint(0, 41, (2, length), generator=torch.Generator().manual_seed(length))
        wanted = loss_and_gradients(theirs, tokens)
        for model in (ours, reread) if length > 2 * ORIGINAL else (ours,):
            for got, right in zip(loss_and_gradients(model, tokens), wanted, strict=True):
                assert float((got - right).norm() / right.norm()) < 1e-11
    OUTCOMES[family, "equal"] += 1


REFUSED_TABLES = {"longrope", "unknown", "null type", "no factor", "nan factor", "partial", "per layer type"}


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("family", [member.value for member in Family])
def test_which_tables_are_computed(family: str, table: str, tmp_path: Path) -> None:
    folder = written(tmp_path, VARIANTS[f"{family}, {table} in rope_parameters"])
    if table in REFUSED_TABLES:
        with pytest.raises(InputError, check=has_id(ErrorId.model_not_supported)):
            load_config(folder)
    else:
        scaling = load_config(folder).rope_scaling
        assert ("default" if scaling is None else scaling.type.value) == TABLES[table]["rope_type"]


@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn", "yarn mscale", "llama3"])
def test_generation_goes_on_past_the_original_length_as_in_transformers(kind: str, tmp_path: Path) -> None:
    folder = written(tmp_path / "model", {"model_type": "llama", **BASE, "rope_scaling": TABLES[kind]})
    theirs = oracle(folder)
    ours = Decoder(load_config(folder), dtype=torch.float64)
    load_weights(ours, folder)
    prompt = torch.randint(0, 41, (1, ORIGINAL - 4), generator=torch.Generator().manual_seed(2))
    wanted = theirs.generate(prompt, max_new_tokens=14, do_sample=False, eos_token_id=None, pad_token_id=0)
    with pytest.warns(UserWarning, match="made for"):
        got = generate(ours, prompt[0].tolist(), SamplingConfig(max_new_tokens=14))
    assert got == wanted[0, prompt.shape[1] :].tolist()
