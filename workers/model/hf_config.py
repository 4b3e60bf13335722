"""config.json of transformers, read into a ModelConfig and written from one. What we do not compute is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headrace.kernels.rope_scaling import yarn_mscale
from headrace.storage.core.errors import ErrorId, InputError
from headrace.storage.core.outside import parse_json, read_regular
from headrace.storage.remote.folder import is_remote, open_remote
from headrace.workers.model.config import ATTENTION, Family, ModelConfig, RopeScaling, RopeType

CONFIG_FILE = "config.json"
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

    path: str
    values: Mapping[str, Any]

    def refuse(self, key: str, value: object, remedy: str) -> InputError:
        return InputError(
            f"{self.path}: {key}={json.dumps(value, default=str)}: {remedy}", id=ErrorId.model_not_supported
        )

    def number(self, key: str, kind: type[int] | type[float], where: Mapping[str, Any] | None = None) -> Any:
        values = self.values if where is None else where
        if key not in values:
            raise InputError(
                f"{self.path}: {key} is missing; take the config.json that came with the weights",
                id=ErrorId.model_not_supported,
            )
        value = values[key]
        good = isinstance(value, int) if kind is int else isinstance(value, int | float)
        if isinstance(value, bool) or not good or not 0 < value < math.inf:
            raise self.refuse(key, value, f"a positive {'whole number' if kind is int else 'number'} is wanted")
        return kind(value)

    def flag(self, key: str, where: Mapping[str, Any] | None = None) -> bool:
        value = (self.values if where is None else where)[key]
        if not isinstance(value, bool):
            raise self.refuse(key, value, "true or false is expected")
        return value


def load_config(folder: Path | str) -> ModelConfig:
    """Read config.json of a Hugging Face folder, or of one at a URL (its weights are not fetched).

    A key that changes what transformers computes is computed here too, or refused.

    Returns:
        The shape, with `init_from` unset and the folder's name as its name.

    Raises:
        InputError: no or broken config.json, or a model that this decoder does not compute; names key, value, remedy.
    """
    path, name = f"{folder}/{CONFIG_FILE}", Path(folder).resolve().name
    if isinstance(folder, str) and is_remote(folder):
        content = open_remote(folder).read(CONFIG_FILE)
    else:
        content = _read_local(Path(folder))
    try:
        values = parse_json(content)
    except ValueError as error:
        raise InputError(f"{path}: is not JSON ({error}); fetch it again", id=ErrorId.model_folder_wrong) from error
    return read_config(values, path, name)


def _read_local(folder: Path) -> bytes:
    if not folder.is_dir():
        raise InputError(
            f"{folder}: no such folder; give a Hugging Face model folder. Names on a hub are not downloaded: fetch the "
            "folder first",
            id=ErrorId.model_folder_wrong,
        )
    try:
        return read_regular(folder / CONFIG_FILE)
    except OSError as error:
        raise InputError(
            f"{folder / CONFIG_FILE}: cannot be read ({error.strerror}); give a Hugging Face model folder",
            id=ErrorId.model_folder_wrong,
        ) from error


def read_config(values: object, path: str, name: str) -> ModelConfig:
    """The shape that the content of a config.json describes.

    Args:
        path: of the file, for messages. name: of the model.

    Raises:
        InputError: see load_config.
    """
    if not isinstance(values, dict):
        raise InputError(f"{path}: is not a JSON object; fetch it again", id=ErrorId.model_folder_wrong)
    known = [family.value for family in Family]
    model_type = values.get("model_type")
    if model_type not in known:
        remedy = f"not supported; choose one of {', '.join(known)}"
        raise _Reader(path, values).refuse("model_type", model_type, remedy)
    family = Family(model_type)
    reader = _Reader(path, {**_DEFAULTS, **_FAMILY_DEFAULTS[family], **values})
    _refuse_unknown_maths(reader, family)
    theta, scaling = _rope(reader)
    num_heads = reader.number("num_attention_heads", int)
    kv_is_open = reader.values["num_key_value_heads"] is None and family is not Family.mistral
    num_kv_heads = num_heads if kv_is_open else reader.number("num_key_value_heads", int)
    if num_heads % num_kv_heads:
        raise reader.refuse("num_key_value_heads", num_kv_heads, f"must divide num_attention_heads={num_heads}")
    return ModelConfig(
        name=name,
        family=family,
        vocab_size=reader.number("vocab_size", int),
        hidden_size=reader.number("hidden_size", int),
        num_layers=reader.number("num_hidden_layers", int),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        intermediate_size=reader.number("intermediate_size", int),
        head_dim=None if reader.values["head_dim"] is None else reader.number("head_dim", int),
        rms_norm_eps=reader.number("rms_norm_eps", float),
        rope_theta=theta,
        rope_scaling=scaling,
        qkv_bias=family is Family.qwen2,
        qk_norm=family is Family.qwen3,
        tie_embeddings=reader.flag("tie_word_embeddings"),
        sliding_window=_window(reader, family),
        pad_token_id=_pad_token(reader),
        max_position_embeddings=reader.number("max_position_embeddings", int),
        init_std=reader.number("initializer_range", float),
    )


def _refuse_unknown_maths(reader: _Reader, family: Family) -> None:
    values, wanted = reader.values, _ARCHITECTURES[family]
    if values.get("architectures") and wanted not in values["architectures"]:
        raise reader.refuse("architectures", values["architectures"], f"not supported; a {wanted} is wanted")
    if values["hidden_act"] not in ("silu", "swish"):
        raise reader.refuse("hidden_act", values["hidden_act"], "not supported; only silu is")
    for key in ("attention_bias", "mlp_bias"):
        if values[key] and not (key == "attention_bias" and family in (Family.qwen2, Family.mistral)):
            raise reader.refuse(key, values[key], f"not supported for {family.value}; take a model without it")
    for key in ("quantization_config", "compression_config"):
        if values.get(key) is not None:
            raise reader.refuse(key, "...", "quantised weights are not supported; take the bf16 model")
    if values.get("per_layer_config"):
        raise reader.refuse("per_layer_config", "...", "layers that differ are not supported; take a model without it")
    if values.get("attention_dropout"):
        raise reader.refuse("attention_dropout", values["attention_dropout"], "not supported; set it to 0 there")


def _pad_token(reader: _Reader) -> int | None:
    """The row of the embedding without gradient; -1 is the last one, as in torch."""
    value, vocab_size = reader.values.get("pad_token_id"), reader.number("vocab_size", int)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not -vocab_size <= value < vocab_size:
        raise reader.refuse("pad_token_id", value, f"a token id below vocab_size={vocab_size}, or null")
    return value % vocab_size


def _rope(reader: _Reader) -> tuple[float, RopeScaling | None]:
    """Base and scaling, from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before)."""
    values = reader.values
    key = "rope_scaling" if values.get("rope_scaling") else "rope_parameters"
    given = values.get(key) or {}
    if not isinstance(given, dict) or any(isinstance(value, dict) for value in given.values()):
        raise reader.refuse(key, given, "one set of values for all layers is expected")
    theta_from = given if "rope_theta" in given else {"rope_theta": _DEFAULT_THETA, **values}
    theta = reader.number("rope_theta", float, theta_from)
    partial = given.get("partial_rotary_factor", values.get("partial_rotary_factor"))
    if partial not in (None, 1.0):
        raise reader.refuse("partial_rotary_factor", partial, "not supported; only whole heads (1.0) are")
    kind = given.get("rope_type", given.get("type", "default"))
    if kind == "default":
        return theta, None
    known = [member.value for member in RopeType]
    if kind not in known:
        raise reader.refuse(f"{key}.rope_type", kind, f"not supported; default, {', '.join(known)} are")
    return theta, _scaling(reader, key, RopeType(kind), given)


def _scaling(reader: _Reader, key: str, kind: RopeType, given: Mapping[str, Any]) -> RopeScaling:
    """One table of rotary values, with the defaults of transformers."""
    longest = reader.number("max_position_embeddings", int)
    original = given.get("original_max_position_embeddings", longest)
    # transformers lets the key beside the table win over the one in it, and the dynamic type knows neither.
    original = reader.values.get("original_max_position_embeddings", original)
    original = longest if kind is RopeType.dynamic else original
    if kind is not RopeType.linear:
        original = reader.number(
            "original_max_position_embeddings", int, {"original_max_position_embeddings": original}
        )
    if kind is RopeType.yarn and "factor" in given and given["factor"] is None:
        given = {**given, "factor": longest / original}
    scaling = RopeScaling(type=kind, factor=reader.number("factor", float, given))
    if kind is not RopeType.linear:
        scaling.original_max_position = original
    if kind is RopeType.dynamic and reader.values["head_dim"] == 2:
        raise reader.refuse("head_dim", 2, "dynamic rotary scaling wants wider heads")
    if kind is RopeType.yarn:
        _read_yarn(reader, given, scaling)
    if kind is RopeType.llama3:
        scaling.low_freq_factor = reader.number("low_freq_factor", float, given)
        scaling.high_freq_factor = reader.number("high_freq_factor", float, given)
        if scaling.high_freq_factor <= scaling.low_freq_factor:
            raise reader.refuse(f"{key}.high_freq_factor", scaling.high_freq_factor, "must be above low_freq_factor")
    return scaling


def _read_yarn(reader: _Reader, given: Mapping[str, Any], scaling: RopeScaling) -> None:
    """What only yarn has; `mscale` and `mscale_all_dim` become the attention factor that they stand for."""

    def optional(key: str) -> float | None:
        return None if given.get(key) is None else float(reader.number(key, float, given))

    scaling.beta_fast = optional("beta_fast") or scaling.beta_fast
    scaling.beta_slow = optional("beta_slow") or scaling.beta_slow
    scaling.truncate = reader.flag("truncate", {"truncate": True, **given})
    scaling.attention_factor = optional("attention_factor")
    mscale, of_all = optional("mscale"), optional("mscale_all_dim")
    if scaling.attention_factor is None and mscale is not None and of_all is not None:
        scaling.attention_factor = yarn_mscale(scaling.factor, mscale) / yarn_mscale(scaling.factor, of_all)


def _window(reader: _Reader, family: Family) -> int | None:
    """The window of all layers; a mixture of layers with and without one is refused."""
    values, kinds = reader.values, reader.values.get("layer_types")
    num_layers = reader.number("num_hidden_layers", int)
    if family is Family.llama:
        if values["sliding_window"] is not None:
            raise reader.refuse(
                "sliding_window", values["sliding_window"], "a Llama model has no window; set it to null"
            )
        window = None
    elif family is Family.mistral:
        if "layer_types" in values:  # transformers makes another architecture of it
            raise reader.refuse(
                "layer_types", kinds, "not supported for mistral; take the key out if all layers are alike"
            )
        return None if values["sliding_window"] is None else int(reader.number("sliding_window", int))
    else:
        given = reader.flag("use_sliding_window") and values["sliding_window"] is not None
        window = int(reader.number("sliding_window", int)) if given else None
        if kinds is None:
            first = values["max_window_layers"]
            if window is not None and (isinstance(first, bool) or not isinstance(first, int)):
                raise reader.refuse("max_window_layers", first, "a whole number is expected")
            kinds = [
                "sliding_attention" if window is not None and i >= first else "full_attention"
                for i in range(num_layers)
            ]
    if kinds is None or kinds == ["full_attention"] * num_layers:
        return None
    if window is not None and kinds == ["sliding_attention"] * num_layers:
        return window
    key = "layer_types" if values.get("layer_types") else "max_window_layers"
    raise reader.refuse(key, values[key], "a window in some layers only is not supported; use all or none")


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
    if any(name != ATTENTION for name in config.mixers):
        raise InputError(f"model.mixers={config.mixers}: transformers' {family.value} has {ATTENTION} in every layer")
    scaling = config.rope_scaling
    rope = {"rope_type": "default"} if scaling is None else _rope_table(scaling)
    longest = config.max_position_embeddings
    if scaling is not None and scaling.type is RopeType.dynamic:
        longest = scaling.original_max_position  # what transformers takes for it
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
        "max_position_embeddings": longest,
        "initializer_range": config.init_std,
        "attention_dropout": 0.0,
        "use_cache": True,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": config.pad_token_id,
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


def _rope_table(scaling: RopeScaling) -> dict[str, Any]:
    """The rotary values as transformers names them, only those that the type reads."""
    table: dict[str, Any] = {"rope_type": scaling.type.value, "factor": scaling.factor}
    if scaling.type in (RopeType.yarn, RopeType.llama3):
        table["original_max_position_embeddings"] = scaling.original_max_position
    if scaling.type is RopeType.llama3:
        table |= {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
    if scaling.type is RopeType.yarn:
        table |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow, "truncate": scaling.truncate}
        table["attention_factor"] = scaling.table_scale
    return table
