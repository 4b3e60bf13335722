"""config.json of transformers, read into a ModelConfig and written from one. What we do not compute is refused."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headrace.storage.core.errors import InputError
from headrace.workers.model.config import Family, ModelConfig, RopeScaling

CONFIG_FILE, GENERATION_FILE = "config.json", "generation_config.json"
_ARCHITECTURES = {
    Family.llama: "LlamaForCausalLM",
    Family.qwen2: "Qwen2ForCausalLM",
    Family.qwen3: "Qwen3ForCausalLM",
    Family.mistral: "MistralForCausalLM",
}
_DEFAULT_THETA = 10000.0
# What transformers takes for keys that config.json does not have. None for num_key_value_heads: as many as heads.
_DEFAULTS: dict[str, Any] = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "use_sliding_window": False,
    "max_window_layers": 28,
    "head_dim": None,
    "sliding_window": None,
}
_FAMILY_DEFAULTS: dict[Family, dict[str, Any]] = {
    Family.llama: {"num_key_value_heads": None, "max_position_embeddings": 2048},
    Family.mistral: {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
    Family.qwen2: {"num_key_value_heads": 32, "max_position_embeddings": 32768, "sliding_window": 4096},
    Family.qwen3: {
        "num_key_value_heads": 32,
        "max_position_embeddings": 32768,
        "sliding_window": 4096,
        "head_dim": 128,
    },
}


@dataclass(frozen=True)
class _Reader:
    """The keys of one config.json, with the words for what is wrong with them."""

    path: Path
    values: Mapping[str, Any]

    def refuse(self, key: str, value: object, remedy: str) -> InputError:
        return InputError(f"{self.path}: {key}={json.dumps(value, default=str)}: {remedy}")

    def number(self, key: str, kind: type[int] | type[float], where: Mapping[str, Any] | None = None) -> Any:
        values = self.values if where is None else where
        if key not in values:
            raise InputError(f"{self.path}: {key} is missing; take the config.json that came with the weights")
        value = values[key]
        good = isinstance(value, int) if kind is int else isinstance(value, int | float)
        if isinstance(value, bool) or not good or value <= 0:
            raise self.refuse(key, value, f"a positive {'whole number' if kind is int else 'number'} is wanted")
        return kind(value)


def load_config(folder: Path | str) -> ModelConfig:
    """Read config.json of a Hugging Face folder.

    Returns:
        The shape, with `init_from` unset and the folder's name as its name.

    Raises:
        InputError: no or broken config.json, or a model that this decoder does not compute; names key, value, remedy.
    """
    path = Path(folder) / CONFIG_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); give a Hugging Face model folder") from error
    except ValueError as error:
        raise InputError(f"{path}: is not JSON ({error}); fetch it again") from error
    if not isinstance(values, dict):
        raise InputError(f"{path}: is not a JSON object; fetch it again")
    known = [family.value for family in Family]
    model_type = values.get("model_type")
    if model_type not in known:
        raise InputError(f"{path}: model_type={json.dumps(model_type)}: not built; choose one of {', '.join(known)}")
    family = Family(model_type)
    reader = _Reader(path, {**_DEFAULTS, **_FAMILY_DEFAULTS[family], **values})
    _refuse_unknown_maths(reader, family)
    theta, scaling = _rope(reader)
    kv_heads = "num_key_value_heads" if reader.values["num_key_value_heads"] is not None else "num_attention_heads"
    return ModelConfig(
        name=Path(folder).resolve().name,
        family=family,
        vocab_size=reader.number("vocab_size", int),
        hidden_size=reader.number("hidden_size", int),
        num_layers=reader.number("num_hidden_layers", int),
        num_heads=reader.number("num_attention_heads", int),
        num_kv_heads=reader.number(kv_heads, int),
        intermediate_size=reader.number("intermediate_size", int),
        head_dim=None if reader.values["head_dim"] is None else reader.number("head_dim", int),
        rms_norm_eps=reader.number("rms_norm_eps", float),
        rope_theta=theta,
        rope_scaling=scaling,
        qkv_bias=family is Family.qwen2,
        qk_norm=family is Family.qwen3,
        tie_embeddings=bool(reader.values["tie_word_embeddings"]),
        sliding_window=_window(reader, family),
        max_position_embeddings=reader.number("max_position_embeddings", int),
        init_std=reader.number("initializer_range", float),
    )


def _refuse_unknown_maths(reader: _Reader, family: Family) -> None:
    values = reader.values
    if values["hidden_act"] != "silu":
        raise reader.refuse("hidden_act", values["hidden_act"], "only silu is built")
    for key in ("attention_bias", "mlp_bias"):
        if values[key] and not (key == "attention_bias" and family in (Family.qwen2, Family.mistral)):
            raise reader.refuse(key, values[key], f"not built for {family.value}; take a model without it")
    if values.get("quantization_config") is not None:
        raise reader.refuse("quantization_config", "...", "quantised weights are not read; take the bf16 model")
    if values.get("attention_dropout"):
        warnings.warn(f"{reader.path}: attention_dropout={values['attention_dropout']} is not applied", stacklevel=3)


def _rope(reader: _Reader) -> tuple[float, RopeScaling | None]:
    """Base and scaling, from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before)."""
    values = reader.values
    key = "rope_scaling" if values.get("rope_scaling") else "rope_parameters"
    given = values.get(key) or {}
    if not isinstance(given, dict) or any(isinstance(value, dict) for value in given.values()):
        raise reader.refuse(key, given, "one set of values for all layers is wanted")
    theta_from = given if "rope_theta" in given else {"rope_theta": _DEFAULT_THETA, **values}
    theta = reader.number("rope_theta", float, theta_from)
    partial = given.get("partial_rotary_factor", values.get("partial_rotary_factor", 1.0))
    if partial != 1.0:
        raise reader.refuse("partial_rotary_factor", partial, "only whole heads (1.0) are built")
    kind = given.get("rope_type", given.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise reader.refuse(f"{key}.rope_type", kind, "only default and llama3 are built")
    original = given.get("original_max_position_embeddings", values["max_position_embeddings"])
    scaling = RopeScaling(
        factor=reader.number("factor", float, given),
        low_freq_factor=reader.number("low_freq_factor", float, given),
        high_freq_factor=reader.number("high_freq_factor", float, given),
        original_max_position=reader.number("original_max_position_embeddings", int, {**given, **_original(original)}),
    )
    if scaling.high_freq_factor <= scaling.low_freq_factor:
        raise reader.refuse(f"{key}.high_freq_factor", scaling.high_freq_factor, "must be above low_freq_factor")
    return theta, scaling


def _original(value: object) -> dict[str, object]:
    return {"original_max_position_embeddings": value}


def _window(reader: _Reader, family: Family) -> int | None:
    """The window of all layers; Qwen's mixture of layers with and without one is refused."""
    values = reader.values
    if family is Family.llama or values["sliding_window"] is None:
        return None
    if family is not Family.mistral and not values["use_sliding_window"]:
        return None
    window: int = reader.number("sliding_window", int)
    if family is Family.mistral:
        return window
    num_layers, first = reader.number("num_hidden_layers", int), values["max_window_layers"]
    kinds = values.get("layer_types") or [
        "sliding_attention" if i >= first else "full_attention" for i in range(num_layers)
    ]
    if set(kinds) == {"full_attention"}:
        return None
    if set(kinds) != {"sliding_attention"}:
        raise reader.refuse("max_window_layers", first, "a window in some layers only is not built; use all or none")
    return window


def config_to_hf(config: ModelConfig, dtype_name: str, **more: Any) -> dict[str, Any]:
    """The content of config.json, for transformers 4 (rope_theta, rope_scaling) and 5 (rope_parameters) alike.

    Args:
        dtype_name: of the weights as saved, as torch spells it without `torch.`.
        more: further keys, such as eos_token_id.

    Raises:
        InputError: the family's rules in transformers do not allow this configuration.
    """
    family = config.family
    for name, wanted in (("qkv_bias", family is Family.qwen2), ("qk_norm", family is Family.qwen3)):
        if getattr(config, name) != wanted:
            raise InputError(
                f"model.{name}={getattr(config, name)}: transformers' {family.value} has {name}={wanted}; choose the "
                "family that fits (qkv_bias: qwen2, qk_norm: qwen3)"
            )
    if family is Family.llama and config.sliding_window is not None:
        raise InputError(
            f"model.sliding_window={config.sliding_window}: transformers' llama has none; choose family mistral"
        )
    rope: dict[str, Any] = {"rope_type": "default"}
    if config.rope_scaling is not None:
        scaling = config.rope_scaling
        rope = {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_position,
        }
    values: dict[str, Any] = {
        "architectures": [_ARCHITECTURES[family]],
        "model_type": family.value,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "intermediate_size": config.intermediate_size,
        "head_dim": config.head_size,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": None if config.rope_scaling is None else rope,
        "rope_parameters": {**rope, "rope_theta": config.rope_theta},
        "tie_word_embeddings": config.tie_embeddings,
        "max_position_embeddings": config.max_position_embeddings,
        "initializer_range": config.init_std,
        "attention_dropout": 0.0,
        "use_cache": True,
        "bos_token_id": None,
        "eos_token_id": None,
        "dtype": dtype_name,
        "torch_dtype": dtype_name,
    }
    if family in (Family.llama, Family.qwen3):
        values["attention_bias"] = False
    if family is Family.llama:
        values["mlp_bias"] = False
    if family is Family.mistral:
        values["sliding_window"] = config.sliding_window
    if family in (Family.qwen2, Family.qwen3):
        windowed = config.sliding_window is not None
        values |= {"use_sliding_window": windowed, "sliding_window": config.sliding_window}
        values["max_window_layers"] = 0 if windowed else config.num_layers
    return {**values, **more}


def end_tokens(folder: Path | str) -> set[int]:
    """The ids that end a text, by generation_config.json or else config.json; none where neither says."""
    for name in (GENERATION_FILE, CONFIG_FILE):
        path = Path(folder) / name
        if not path.is_file():
            continue
        try:
            given = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
        except (OSError, ValueError, AttributeError) as error:
            raise InputError(f"{path}: cannot be read ({error}); fetch it again") from error
        if given is not None:
            return set(given) if isinstance(given, list) else {int(given)}
    return set()
