"""adapter_config.json of PEFT, read into an AdapterConfig and written from one. What we do not compute is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from headrace.storage.core.errors import ErrorId, InputError
from headrace.storage.core.outside import parse_json, read_regular
from headrace.storage.remote.folder import refuse_remote
from headrace.workers.model.config import ALL_PROJECTIONS, PROJECTIONS, AdapterConfig, AdapterKind
from headrace.workers.model.weight_files import read_header

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_EVERY_LINEAR = "all-linear"
# Keys that change no number of a trained adapter, whatever they say.
_FREE = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "eva_config",
        "inference_mode",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "task_type",
    }
)
_READ = frozenset({"peft_type", "r", "lora_alpha", "lora_dropout", "target_modules", "bias", "init_lora_weights"})
# First values of A and B alone; others (pissa, olora, ...) change the weights that the adapter stands on.
_FIRST_VALUES = (True, False, "gaussian", "orthogonal", "eva")


def read_adapter_config(folder: Path | str) -> AdapterConfig:
    """The adapter of a folder, with `init_from` naming it.

    A key that changes what PEFT computes is computed here too, or refused.

    Raises:
        InputError: no or broken adapter_config.json, or an adapter that is not computed here; names key, value, remedy.
    """
    refuse_remote("adapter.init_from", str(folder))
    path = Path(folder).expanduser().absolute() / ADAPTER_CONFIG
    try:
        values = parse_json(read_regular(path))
        if not isinstance(values, dict):
            raise ValueError("not a JSON object")
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path}: cannot be read ({error}); give a folder that PEFT's save_pretrained wrote",
            id=ErrorId.model_folder_wrong,
        ) from error

    def refuse(key: str, remedy: str) -> InputError:
        shown = json.dumps(values.get(key), default=str)
        return InputError(f"{path}: {key}={shown}: {remedy}", id=ErrorId.model_not_supported)

    if values.get("peft_type") != "LORA":
        raise refuse("peft_type", "not supported; LORA is")
    if values.get("bias", "none") != "none":
        raise refuse("bias", "not supported: biases are frozen; train the adapter with bias=none")
    for key, value in values.items():
        if key not in _FREE | _READ and value not in (None, False, {}, [], ""):
            raise refuse(key, "not supported; train the adapter without it")
    if values.get("init_lora_weights", True) not in _FIRST_VALUES:
        raise refuse("init_lora_weights", "not supported: it changes the model's own weights; merge it in PEFT first")
    rank = values.get("r")
    if type(rank) is not int or rank < 1:
        raise refuse("r", "a whole number from 1 is wanted")
    numbers: dict[str, float] = {}
    for key, default in (("lora_alpha", 8), ("lora_dropout", 0.0)):
        value = values.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise refuse(key, "a number from 0 is wanted")
        numbers[key] = float(value)
    return AdapterConfig(
        kind=AdapterKind.lora,
        rank=rank,
        alpha=numbers["lora_alpha"],
        dropout=numbers["lora_dropout"],
        targets=_targets(values.get("target_modules"), refuse),
        init_from=str(path.parent),
    )


def check_adapter_weights(folder: Path | str) -> None:
    """Look whether a folder's weights can be read. Raises InputError: no such file, or one that is cut short."""
    path = Path(folder) / ADAPTER_WEIGHTS
    if not path.is_file():
        raise InputError(
            f"{path}: missing; give a folder that PEFT's save_pretrained wrote, with safetensors",
            id=ErrorId.model_folder_wrong,
        )
    read_header(path)


def peft_config(adapter: AdapterConfig, trunk: str | None) -> dict[str, Any]:
    """Content of adapter_config.json.

    Args:
        trunk: folder of the model that the adapter stands on.
    """
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": trunk,
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "lora_dropout": adapter.dropout,
        "target_modules": list(adapter.projections),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
    }


def _targets(value: Any, refuse: Any) -> str:
    if value == _EVERY_LINEAR:
        return ALL_PROJECTIONS
    names = value if isinstance(value, list) else None
    if not names or any(name not in PROJECTIONS for name in names):
        raise refuse("target_modules", f"a list of some of {', '.join(PROJECTIONS)} is wanted")
    ordered = tuple(name for name in PROJECTIONS if name in names)
    return ALL_PROJECTIONS if ordered == PROJECTIONS else ",".join(ordered)
