"""Model shapes of conf/model for programs that run without Hydra: plain YAML, checked by the dataclass itself."""

from __future__ import annotations

from dataclasses import fields

import yaml

from headrace.platform.paths import CONF_DIR
from headrace.storage.core.errors import InputError
from headrace.workers.model.config import Family, ModelConfig, RopeScaling, RopeType


def model_shape(name: str) -> ModelConfig:
    """The decoder of conf/model/NAME.yaml.

    Raises:
        InputError: there is no such file.
    """
    path = CONF_DIR / "model" / f"{name}.yaml"
    if not path.is_file():
        there = ", ".join(sorted(file.stem for file in path.parent.glob("*.yaml")))
        raise InputError(f"model {name!r}: no such shape in conf/model; choose one of {there}")
    known = {field.name for field in fields(ModelConfig)}
    values = {key: value for key, value in yaml.safe_load(path.read_text()).items() if key in known}
    values["family"] = Family(values["family"])
    if values.get("rope_scaling") is not None:
        scaling = values["rope_scaling"]
        values["rope_scaling"] = RopeScaling(**{**scaling, "type": RopeType(scaling.get("type", "llama3"))})
    return ModelConfig(**values)
