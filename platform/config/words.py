"""The words of a command line: `GROUP=CHOICE` and `key=value`, checked before Hydra sees any of them.

A value is taken literally: quotes, commas, braces and dollars need no escape. Neither Hydra's grammar nor
OmegaConf's interpolation reads it.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from headrace.platform.config.recipe import SUFFIX
from headrace.platform.config.schema import KeyType, key_types
from headrace.platform.keys import check_text, did_you_mean
from headrace.platform.paths import CONF_DIR
from headrace.storage.core.errors import ErrorId, InputError

CONF_WORD = "conf"
CONF_VARIABLE, OVERRIDES_VARIABLE = "HEADRACE_CONF", "HEADRACE_OVERRIDES"
OVERLAYS = ("experiment", "debug")
# A group of which several choices hold at once: tracking=[mlflow,tensorboard].
SEVERAL = "tracking"
NO_CHOICE = ("null", "")  # of an overlay: none


@dataclass(frozen=True)
class Assignment:
    """One word, split at its first `=`."""

    key: str
    value: str

    @property
    def word(self) -> str:
        """As it was written."""
        return f"{self.key}={self.value}"


@dataclass(frozen=True)
class Words:
    """All words of one command: choices of groups (the last one counts), then values in their order."""

    choices: Mapping[str, str]
    values: tuple[Assignment, ...]


def group_choices() -> dict[str, tuple[str, ...]]:
    """group -> names of its choices: the files of conf/GROUP/."""
    folders = sorted(path for path in CONF_DIR.iterdir() if path.is_dir() and path.name.isidentifier())
    found = {folder.name: tuple(sorted(file.stem for file in folder.glob("*.yaml"))) for folder in folders}
    return {group: names for group, names in found.items() if names}


def environment_words(environ: Mapping[str, str]) -> list[str]:
    """The words that `make VERB conf=... overrides=...` passes.

    Args:
        environ: HEADRACE_CONF is GROUP/NAME, the name of an experiment or the path of a recipe (.yaml);
            HEADRACE_OVERRIDES is split as a shell would.

    Raises:
        InputError: no such configuration (the list is printed), or an unclosed quote.
    """
    words: list[str] = []
    check_text((environ.get(CONF_VARIABLE, ""), environ.get(OVERRIDES_VARIABLE, "")))
    conf = environ.get(CONF_VARIABLE, "").strip()
    if conf:
        words.append(_conf_word(conf))
    text = environ.get(OVERRIDES_VARIABLE, "")
    try:
        words += shlex.split(text)
    except ValueError as error:
        raise InputError(f"overrides={text!r}: {error}; close the quote") from None
    return words


def _conf_word(conf: str) -> str:
    group, _, name = conf.removesuffix(SUFFIX).rpartition("/")
    group = group.removeprefix("conf/") or "experiment"
    known = group_choices()
    if name in known.get(group, ()):
        return f"{group}={name}"
    if conf.endswith(SUFFIX):
        return f"experiment={conf}"
    all_names = [f"{overlay}/{choice}" for overlay in OVERLAYS for choice in known.get(overlay, ())]
    hint = did_you_mean(f"{group}/{name}", all_names)
    raise InputError(f"conf={conf}: there is no such configuration; {hint}\nThere are:\n  " + "\n  ".join(all_names))


def parse_words(words: Sequence[str]) -> Words:
    """Split and check the words; types are checked later, where the value meets its field. `conf=` is a choice, too.

    Raises:
        InputError: `+key` or `~key`, no `=`, an unknown key or group, a choice that does not exist.
    """
    groups, keys = group_choices(), key_types()
    choices: dict[str, str] = {}
    values: list[Assignment] = []
    for word in words:
        assignment = _split(word)
        if assignment.key == CONF_WORD:
            assignment = _split(_conf_word(assignment.value))
        key, value = assignment.key, assignment.value
        if key in groups:
            for choice in _listed(key, value):
                _check_choice(key, choice, groups[key])
            choices[key] = value
        else:
            _check_key(key, keys, tuple(groups))
            values.append(assignment)
    return Words(choices, tuple(values))


def check_choices(recipe: str, choices: Mapping[str, str]) -> None:
    """Check what a recipe chooses.

    Raises:
        InputError: an unknown group, or no such choice.
    """
    groups = group_choices()
    for group, choice in choices.items():
        if group not in groups or group in OVERLAYS:
            known = [name for name in groups if name not in OVERLAYS]
            hint = did_you_mean(group, known) or f"there are {', '.join(known)}"
            raise InputError(f"conf={recipe}: override /{group}: no such group; {hint}", id=ErrorId.recipe_wrong)
        try:
            for each in _listed(group, choice):
                _check_choice(group, each, groups[group])
        except InputError as error:
            raise InputError(f"conf={recipe}: {error}", id=ErrorId.recipe_wrong) from None


def is_null(text: str) -> bool:
    """Whether a typed value says that there is none."""
    return text.strip().lower() in ("null", "none", "~")


def _split(word: str) -> Assignment:
    if word.startswith(("+", "~")):
        raise InputError(
            f"{word}: keys cannot be added or removed, only set: leave the `{word[0]}` out"
            + (" (the word after it is the key)" if word.startswith("++") else "")
        )
    if word.startswith("-"):
        raise InputError(f"{word}: unknown flag; settings are written KEY=VALUE")
    key, equals, value = word.partition("=")
    if not equals:
        raise InputError(f"{word}: not KEY=VALUE; for example train.steps=50, or memory=auto")
    return Assignment(key.strip(), value)


def _listed(group: str, value: str) -> list[str]:
    """The choices of a word: more than one only in the brackets of a group that takes several."""
    if group == SEVERAL and value.startswith("[") and value.endswith("]"):
        return [choice.strip() for choice in value[1:-1].split(",")]
    return [value]


def _check_choice(group: str, value: str, names: Sequence[str]) -> None:
    if value in names or (group in OVERLAYS and value in NO_CHOICE) or (group, value[-5:]) == ("experiment", SUFFIX):
        return
    hint = did_you_mean(value, names)
    raise InputError(f"{group}={value}: no such choice; {hint} There are: {', '.join(names)}".replace("  ", " "))


def _check_key(key: str, keys: Mapping[str, KeyType], groups: Sequence[str]) -> None:
    if key in keys:
        return
    parent = key.rpartition(".")[0]
    if parent in keys and keys[parent].kind is dict:
        return
    hint = did_you_mean(key, (*keys, *groups))
    if parent in keys and keys[parent].is_branch:
        listed = ", ".join(name for name in keys if name.rpartition(".")[0] == parent)
        raise InputError(f"{key}: no such key; {hint} {parent} has: {listed}".replace("  ", " "))
    top = ", ".join(sorted({*groups, *(name for name in keys if "." not in name)}))
    raise InputError(f"{key}: no such key; {hint or f'the top level has: {top}'}")
