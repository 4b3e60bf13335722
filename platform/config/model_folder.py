"""A model whose shape comes from a Hugging Face folder, combined with what was typed. No torch."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from headrace.storage.core.errors import ErrorId, InputError
from headrace.workers.model.config import AdapterConfig, ModelConfig, RopeScaling

# Numbers of a formula: weights fit any value, and long-context recipes change them on purpose.
FORMULA = ("rope_theta", "rope_scaling", "rms_norm_eps", "sliding_window", "pad_token_id")
FREE = ("name", "init_from", "init_std", "max_position_embeddings")


def check_folder(ours: ModelConfig, theirs: ModelConfig, chosen: str | None) -> tuple[str, ...]:
    """Compare the model of a run with that of its `init_from` folder.

    Args:
        chosen: the file of conf/model that the words, an experiment or a recipe chose.

    Returns:
        Warnings: numbers of a formula that differ.

    Raises:
        InputError: a shape that the folder's weights do not have; names every key that differs and both values.
    """
    wrong: list[str] = []
    odd: list[str] = []
    for key in (item.name for item in fields(ModelConfig) if item.name not in FREE):
        mine, there = getattr(ours, key), getattr(theirs, key)
        if key == "head_dim":
            same_width = (ours.hidden_size, ours.num_heads) == (theirs.hidden_size, theirs.num_heads)
            there = theirs.head_size
            mine = ours.head_size if ours.head_dim is not None or same_width else there
        if mine != there:
            sentence = f"model.{key}={_words(mine)}: model.init_from says {_words(there)}"
            (odd if key in FORMULA else wrong).append(sentence)
    if wrong:
        what = "these keys" if chosen is None else f"model={chosen}, or the experiment that chooses it,"
        wrong.append(f"leave {what} out: the shape is read from model.init_from={ours.init_from}")
        raise InputError("\n".join(wrong), id=ErrorId.model_folder_contradicted)
    return tuple(odd)


def check_adapter(ours: Any, theirs: AdapterConfig) -> None:
    """Refuse an adapter that is not that of its `init_from` folder; the dropout is the run's own.

    Args:
        ours: with the attributes of an AdapterConfig.

    Raises:
        InputError: names every key that differs and both values.
    """
    wrong = [
        f"adapter.{key}={getattr(ours, key)}: adapter.init_from={theirs.init_from} says {getattr(theirs, key)}; "
        f"leave adapter.{key} out"
        for key in ("rank", "alpha", "targets")
        if getattr(ours, key) != getattr(theirs, key)
    ]
    if wrong:
        raise InputError("\n".join(wrong), id=ErrorId.model_folder_contradicted)


def _words(value: object) -> str:
    if not isinstance(value, RopeScaling):
        return str(value)
    return "{" + ", ".join(f"{item.name}: {getattr(value, item.name)}" for item in fields(value)) + "}"
