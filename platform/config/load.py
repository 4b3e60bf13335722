"""Words to a checked RunConfig: Hydra composes the files, OmegaConf checks the types, plain dataclasses come out.

Only this module and `messages.py` import Hydra and OmegaConf; neither torch nor Ray is imported.
"""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, cast

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf, open_dict

from headrace.platform.config.literal import hidden, shown
from headrace.platform.config.messages import RECIPE, explained
from headrace.platform.config.model_folder import FORMULA, FREE, check_adapter, check_folder
from headrace.platform.config.recipe import SUFFIX, read_recipe
from headrace.platform.config.rules import check_config
from headrace.platform.config.schema import KeyType, RunConfig, flat_items, key_types
from headrace.platform.config.words import (
    NO_CHOICE,
    Assignment,
    check_choices,
    environment_words,
    group_choices,
    is_null,
    parse_words,
)
from headrace.platform.keys import did_you_mean, separated, whole_numbers
from headrace.platform.paths import CONF_DIR
from headrace.storage.core.errors import ErrorId, InputError
from headrace.storage.core.outside import yaml_text
from headrace.storage.remote.folder import is_remote
from headrace.workers.model.config import NO_ADAPTER, AdapterConfig, AdapterKind, ModelConfig
from headrace.workers.model.hf_config import load_config
from headrace.workers.model.peft_config import read_adapter_config

# Taken where the words choose no experiment, no model and no machine: what a bare `headrace train` runs.
DEFAULT_EXPERIMENT = "default"
CHOOSES_A_RUN = ("experiment", "model", "hardware")
# Taken where they name a model folder and no experiment: settings for weights that are trained already.
FOLDER_EXPERIMENT = "finetune"
INIT_FROM = "model.init_from"
ADAPTER_FROM = "adapter.init_from"
# The default model of conf/config.yaml: a model folder replaces it.
NOBODYS_MODEL = "llama_5m"
CONFIG_FILE = "config.yaml"


@dataclass(frozen=True)
class LoadedConfig:
    """A configuration that passed every rule.

    Args:
        text: resolved YAML, the content of the run's config.yaml; loads to the same configuration.
        choices: group -> choice that the words (or the default experiment) made.
        warnings: sentences a person should read before the run.
        changed: key -> (value before, value) of what the words set: against the choices they made, or the saved file.
    """

    config: RunConfig
    text: str
    choices: Mapping[str, str]
    warnings: tuple[str, ...] = ()
    changed: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)


def load_run_config(words: Sequence[str] = (), *, environ: Mapping[str, str] | None = None) -> LoadedConfig:
    """Compose, override, check and convert one run's configuration.

    Args:
        words: `GROUP=CHOICE` and `key=value`; they win over those of the environment.
        environ: where HEADRACE_CONF and HEADRACE_OVERRIDES are looked up; None means os.environ.

    Raises:
        InputError: names the key, the value, what was expected and the nearest name that exists.
    """
    parsed = parse_words((*environment_words(os.environ if environ is None else environ), *words))
    choices = dict(parsed.choices)
    folders = [assignment for assignment in parsed.values if assignment.key == INIT_FROM]
    adapters = [assignment for assignment in parsed.values if assignment.key == ADAPTER_FROM]
    if adapters and not is_null(adapters[-1].value):
        choices.setdefault("adapter", AdapterKind.lora.value)
    if folders and not is_null(folders[-1].value):
        choices.setdefault("experiment", FOLDER_EXPERIMENT)
    if not any(group in choices for group in CHOOSES_A_RUN):
        choices["experiment"] = DEFAULT_EXPERIMENT
    tree, choices = _compose(choices)
    keys = key_types()
    for assignment in (*folders, *adapters):
        _assign(tree, assignment, keys)
    folder_adapter = _take_adapter(tree)
    folder_model = _take_folder(tree, choices)
    before = copy.deepcopy(tree)
    if folders:
        before.model.init_from = None
    if adapters:
        before.adapter.init_from = None
    for assignment in parsed.values:
        if assignment not in (*folders, *adapters):
            _assign(tree, assignment, keys)
    if folder_adapter is not None:
        check_adapter(tree.adapter, folder_adapter)
    return _with_changes(_finish(tree, choices, folder_model), before)


def load_saved_config(
    path: str | Path, words: Sequence[str] = (), *, environ: Mapping[str, str] | None = None
) -> LoadedConfig:
    """The configuration a run folder keeps (config.yaml), with `key=value` words over it.

    Raises:
        InputError: no such file, not a configuration of this version, a bad word; choices of groups are refused,
            because a saved configuration is complete.
    """
    path = Path(path)
    words = (*environment_words(os.environ if environ is None else environ), *words)
    parsed = parse_words(words)
    for group, choice in parsed.choices.items():
        if group != "memory":
            raise InputError(f"{group}={choice}: a saved configuration takes single keys only (key=value)")
    tree = OmegaConf.structured(RunConfig)
    with explained(str(path)):
        try:
            saved = OmegaConf.to_container(OmegaConf.create(hidden(yaml_text(path))))
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror}); is it a run folder?") from None
        except ValueError as error:
            raise InputError(f"{path}: not a run's configuration ({error})") from error
        tree = cast(DictConfig, OmegaConf.merge(tree, hidden(saved)))
    before, keys = copy.deepcopy(tree), key_types()
    if preset := parsed.choices.get("memory"):
        _assign(tree, Assignment("memory.preset", preset), keys)
    for assignment in parsed.values:
        _assign(tree, assignment, keys)
    return _with_changes(_finish(tree, dict(parsed.choices)), before)


def config_text(config: RunConfig) -> str:
    """YAML of a configuration; load_saved_config reads it back."""
    return str(shown(OmegaConf.to_yaml(OmegaConf.structured(hidden(config)))))


def _compose(choices: dict[str, str]) -> tuple[DictConfig, dict[str, str]]:
    """The tree of the chosen files, and the choices with those of a recipe and the model that an experiment chose."""
    store = _store()
    names, recipe = choices, choices.get("experiment", "")
    if recipe.endswith(SUFFIX):
        content = read_recipe(recipe, group_choices())
        check_choices(recipe, content.choices)
        choices = {**content.choices, **choices}
        group, name = RECIPE.split("/")
        store.store(group=group, name=name, node=dict(content.values), package="_global_")
        names = {**choices, group: name}
    overrides = [f"{group}={choice}" for group, choice in names.items() if choice not in NO_CHOICE]
    GlobalHydra.instance().clear()
    with explained("conf", recipe), initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        tree = compose(config_name="config", overrides=overrides, return_hydra_config=True)
    model = tree.hydra.runtime.choices.model
    with open_dict(tree):
        del tree["hydra"]
    return tree, choices if model == NOBODYS_MODEL else {**choices, "model": model}


@functools.cache
def _store() -> ConfigStore:
    """Where Hydra finds the schema; it is built once in a process."""
    store = ConfigStore.instance()
    store.store(name="run_config", node=RunConfig)
    return store


def _named(value: str | None, key: str, what: str) -> str | None:
    """The folder that a key names, if any. Raises InputError where it is empty."""
    given = shown(value)
    if given is not None and not given.strip():
        raise InputError(f"{key}=: empty; name {what}", id=ErrorId.model_folder_wrong)
    return given


def _take_folder(tree: DictConfig, choices: Mapping[str, str]) -> ModelConfig | None:
    """Lay the shape of `model.init_from` into the tree, except what an experiment, a recipe or a model's file says.

    Returns:
        The folder's model; None without a folder.

    Raises:
        InputError: a folder that cannot be used.
    """
    given = _named(tree.model.init_from, INIT_FROM, "a Hugging Face model folder")
    if given is None:
        return None
    folder = given if is_remote(given) else str(Path(given).expanduser().absolute())
    try:
        theirs = load_config(folder)
    except InputError as error:
        raise InputError(f"{INIT_FROM}={given}: {error}", id=error.id) from None
    chosen = CONF_DIR / "model" / f"{choices.get('model', NOBODYS_MODEL)}.yaml"
    before = cast(DictConfig, OmegaConf.merge(OmegaConf.structured(ModelConfig), OmegaConf.load(chosen)))
    for key in (item.name for item in fields(ModelConfig)):
        said = tree.model[key] != before[key] or ("model" in choices and key not in (*FREE, *FORMULA))
        if not said:
            tree.model[key] = hidden(getattr(theirs, key))
    tree.model.init_from = hidden(folder)
    return theirs


def _take_adapter(tree: DictConfig) -> AdapterConfig | None:
    """Lay rank, alpha, dropout and targets of `adapter.init_from` into the tree, except what a recipe says.

    Returns:
        The folder's adapter; None without a folder.

    Raises:
        InputError: a folder that cannot be used.
    """
    given = _named(tree.adapter.init_from, ADAPTER_FROM, "a folder in PEFT's format")
    if given is None:
        return None
    theirs = read_adapter_config(given)
    for item in fields(AdapterConfig):
        if item.name != "kind" and tree.adapter[item.name] in (getattr(NO_ADAPTER, item.name), hidden(given)):
            tree.adapter[item.name] = hidden(getattr(theirs, item.name))
    return theirs


def _assign(tree: DictConfig, assignment: Assignment, keys: Mapping[str, KeyType]) -> None:
    """Set one key to the text of a word, converted by the key's own type."""
    key_type = keys.get(assignment.key)
    value: Any = assignment.value
    if key_type is None:
        pass  # a free key of a mapping: text as it stands
    elif key_type.optional and is_null(value):
        value = None
    elif key_type.is_branch:
        value = _mapping(assignment, key_type)
    elif key_type.kind is list:
        numbers = key_type.items is int
        value = whole_numbers(assignment.key, assignment.value) if numbers else separated(assignment.value)
    elif value == "" and key_type.kind is not str:
        raise InputError(f"{assignment.word}: a value is missing; expected {key_type.describe()}")
    _open_optional_parent(tree, assignment.key, keys)
    with explained(assignment.word):
        OmegaConf.update(
            tree, assignment.key, hidden(value), merge=True, force_add=key_type is None or key_type.kind is dict
        )


def _mapping(assignment: Assignment, key_type: KeyType) -> Any:
    try:
        value = yaml.safe_load(assignment.value)
    except yaml.YAMLError:
        value = None
    if not isinstance(value, dict):
        raise InputError(f"{assignment.word}: expected {key_type.describe()}; set its keys one by one")
    if key_type.kind is dict:
        return value
    known = tuple(item.name for item in fields(key_type.kind))
    for name in value:
        if name not in known:
            raise InputError(f"{assignment.word}: no key {name!r}; {did_you_mean(str(name), known)}".rstrip("; "))
    return key_type.kind(**value)


def _open_optional_parent(tree: DictConfig, key: str, keys: Mapping[str, KeyType]) -> None:
    """Give a branch that is null its defaults, so that a key below it can be set."""
    parent = key.rpartition(".")[0]
    if parent and keys[parent].optional and OmegaConf.select(tree, parent) is None:
        OmegaConf.update(tree, parent, keys[parent].kind())


def _finish(tree: DictConfig, choices: Mapping[str, str], folder_model: ModelConfig | None = None) -> LoadedConfig:
    with explained("conf"):
        OmegaConf.resolve(tree)
        config = cast(RunConfig, shown(OmegaConf.to_object(tree)))
        text = str(shown(OmegaConf.to_yaml(tree)))
    differ = () if folder_model is None else check_folder(config.model, folder_model, choices.get("model"))
    return LoadedConfig(config, text, choices, (*differ, *check_config(config)))


def _with_changes(loaded: LoadedConfig, before: DictConfig) -> LoadedConfig:
    """Add what differs from the tree as it was before the words set their values."""
    with explained("conf"):
        OmegaConf.resolve(before)
        was = dict(flat_items(cast(RunConfig, shown(OmegaConf.to_object(before)))))
    changed = {key: (was.get(key), value) for key, value in flat_items(loaded.config) if was.get(key) != value}
    return replace(loaded, changed=changed)
