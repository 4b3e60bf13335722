"""A recipe of one's own: a file like those of conf/experiment, given by its path."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from headrace.platform.config.literal import hidden
from headrace.storage.core.errors import ErrorId, InputError
from headrace.storage.core.outside import yaml_text

SUFFIX = ".yaml"
OVERRIDE = "override /"
FORM = 'defaults is a list of "override /GROUP: CHOICE", as in conf/experiment'


@dataclass(frozen=True)
class Recipe:
    """What a recipe says.

    Args:
        choices: group -> choice, not checked yet.
        values: the values under the groups' names, as nested mappings; text in it is literal (see `hidden`).
    """

    choices: Mapping[str, str]
    values: Mapping[str, Any]


def read_recipe(path: str, groups: Mapping[str, tuple[str, ...]]) -> Recipe:
    """Read a recipe.

    Args:
        groups: group -> its choices.

    Raises:
        InputError: no such file, not YAML, not a mapping; a `defaults` or a group of another form.
    """
    try:
        text = yaml_text(Path(path).expanduser())
        values: Any = OmegaConf.to_container(OmegaConf.create(hidden(text)))
    except OSError as error:
        there = ", ".join(sorted(file.name for file in Path(path).expanduser().parent.glob(f"*{SUFFIX}"))[:10])
        raise _refuse(path, f"cannot be read ({error.strerror})" + (f"; there are: {there}" if there else "")) from None
    except (yaml.YAMLError, ValueError, OmegaConfBaseException) as error:
        raise _refuse(path, f"is not YAML ({' '.join(str(error).split())})") from None
    if not isinstance(values, dict) or not values:
        raise _refuse(path, "is not a mapping of keys to values; see conf/experiment for examples")
    listed = values.pop("defaults", [])
    if not isinstance(listed, list):
        raise _refuse(path, FORM)
    choices: dict[str, str] = {}
    for item in listed:
        entries = list(item.items()) if isinstance(item, dict) else []
        if len(entries) != 1 or not str(entries[0][0]).startswith(OVERRIDE):
            raise _refuse(path, f"{item!r}: {FORM}")
        group, choice = entries[0]
        several = isinstance(choice, list)
        choices[str(group).removeprefix(OVERRIDE)] = f"[{','.join(map(str, choice))}]" if several else str(choice)
    values = {str(key): value for key, value in values.items() if value is not None or key not in groups}
    for group in groups:
        if not isinstance(values.get(group, {}), dict):
            raise _refuse(path, f'{group}: {values[group]}: choose under defaults: - "{OVERRIDE}{group}": NAME')
    return Recipe(choices, values)


def _refuse(path: str, what: str) -> InputError:
    return InputError(f"conf={path}: {what}", id=ErrorId.recipe_wrong)
