"""What Hydra and OmegaConf say, said for people: key, value, what was expected, the nearest name."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import yaml
from hydra.errors import HydraException
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    InterpolationResolutionError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)

from headrace.platform.config.schema import key_types
from headrace.platform.keys import did_you_mean
from headrace.storage.core.errors import InputError

RECIPE = "experiment/_recipe"  # the name of a recipe in Hydra's store


@contextmanager
def explained(where: str, recipe: str | None = None) -> Iterator[None]:
    """Turn the errors of a composition into InputError.

    Args:
        where: the word or file that is being read, the start of the message.
        recipe: the path of the recipe that is being composed.
    """
    try:
        yield
    except yaml.YAMLError as error:
        raise InputError(f"{where}: not YAML: {_one_line(error)}") from error
    except (HydraException, OmegaConfBaseException) as error:
        file = re.match(r"In '([^']+)'", str(error))
        if file:
            where = f"conf/{file[1]}.yaml" if file[1] != RECIPE or recipe is None else f"conf={recipe}"
        key, sentence = where.partition("=")[0], _sentence(error)
        raise InputError(f"{where}: {sentence.removeprefix(f'{key} ').removeprefix(f'{key}: ')}") from error


def _sentence(error: BaseException) -> str:
    cause = error if isinstance(error, OmegaConfBaseException) else error.__context__
    if not isinstance(cause, OmegaConfBaseException):
        return re.sub(r"^In '[^']+': ", "", _one_line(error))
    keys = key_types()
    key = cause.full_key or ""
    if isinstance(cause, MissingMandatoryValue):
        kind = f" (it takes {keys[key].describe()})" if key in keys else ""
        return f"{key} has no value; set {key}=...{kind}"
    if isinstance(cause, InterpolationResolutionError):
        return f"{key}: {_one_line(cause)}".removeprefix(": ")
    if isinstance(cause, ConfigKeyError | ConfigAttributeError):
        return f"{key}: no such key; {did_you_mean(key, tuple(keys))}".rstrip("; ")
    if key in keys:
        hint = ""
        if isinstance(cause.value, str):
            hint = did_you_mean(
                cause.value, [member.name for member in getattr(keys[key].kind, "__members__", {}).values()]
            )
        return f"{key} takes {keys[key].describe()}; {hint}".rstrip("; ")
    return f"{key}: {_one_line(cause)}".lstrip(": ")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split("full_key")[0].split())
