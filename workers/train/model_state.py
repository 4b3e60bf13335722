"""The model of a run out of its checkpoint: what the manifest says of it, and its weights, tensor by tensor.

A checkpoint of a run with adapters holds their weights; the frozen ones are in the folder of `model.init_from`, whose
digest the manifest names, or in the checkpoint where they were drawn at random.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import torch
import torch.distributed.checkpoint as dcp
import xxhash

from headrace.storage.core.errors import ErrorId, InputError
from headrace.storage.remote.folder import is_remote
from headrace.workers.data.tokenizer_files import TOKENIZER_FILE
from headrace.workers.model.adapter import num_adapter_params, num_params
from headrace.workers.model.config import (
    NO_ADAPTER,
    AdapterConfig,
    AdapterKind,
    Family,
    ModelConfig,
    RopeScaling,
    RopeType,
)
from headrace.workers.model.hf import iter_weights
from headrace.workers.model.lora import is_adapter
from headrace.workers.model.peft_files import iter_merged
from headrace.workers.model.remote_model import local_model
from headrace.workers.model.weight_files import read_headers
from headrace.workers.train.checkpoint_folder import MANIFEST_FILE, CheckpointFolder, good_checkpoint
from headrace.workers.train.remote_checkpoint import fetch_to_cache, warn_of
from headrace.workers.train.state_files import StateReader

STATE_FOLDER = "state"
MODEL_PREFIX = "model."
ADAPTER, TRUNK_DIGEST = "adapter", "trunk_digest"  # keys of the manifest's model, of runs with adapters
Named = Iterator[tuple[str, torch.Tensor]]
_READ_BYTES = 8 << 20


@dataclass(frozen=True)
class ModelState:
    """The model of one checkpoint; tensors are on the CPU, under the names of Decoder.state_dict().

    Args:
        step: of the checkpoint.
        trunk_digest: of the weights in `config.init_from`, where those are the frozen ones.
        tokenizer: tokenizer.json of the checkpoint, if it has one.
    """

    config: ModelConfig
    step: int
    adapter: AdapterConfig
    trunk_digest: str | None
    tokenizer: Path | None
    _reader: StateReader
    _shapes: Mapping[str, tuple[int, ...]]

    @property
    def tensors(self) -> Named:
        """Every weight, those of adapters last. Raises as `trunk`."""
        return chain(self.trunk, self.adapters)

    @property
    def adapters(self) -> Named:
        """The weights of the adapters, fp32."""
        return self._stored(adapters=True)

    @property
    def trunk(self) -> Named:
        """All other weights, in fp32 or the dtype of their folder.

        Raises:
            InputError: the folder of the frozen weights is not there, or holds others.
        """
        if self.trunk_digest is None:
            return self._stored(adapters=False)
        folder = str(self.config.init_from)
        found = digest_of_weights(folder)
        if found != self.trunk_digest:
            raise InputError(
                f"{folder}: holds weights of digest {found}, the adapters were trained on {self.trunk_digest}; put the "
                "folder of the run back"
            )
        return iter_weights(folder, self.config)

    @property
    def merged(self) -> Named:
        """The weights of a model without adapters that computes the same. Raises as `trunk`."""
        return iter_merged(self.trunk, self.adapters, self.adapter)

    def _stored(self, *, adapters: bool) -> Named:
        stored: Mapping[str, Any] = self._reader.read_metadata().state_dict_metadata
        for name, shape in self._shapes.items():
            if is_adapter(name) != adapters:
                continue
            tensor = torch.empty(shape, dtype=stored[name].properties.dtype)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "torch.distributed is disabled")
                dcp.load({name: tensor}, storage_reader=self._reader, no_dist=True)
            yield name.removeprefix(MODEL_PREFIX), tensor


def digest_of_weights(folder: Path | str) -> str:
    """XXH3 (64 bit, hex) over the names and bytes of the weight files of a model folder, which it reads whole.

    Raises:
        InputError: no whole model is there.
    """
    digest = xxhash.xxh3_64()
    for path in sorted({entry.file for entry in read_headers(local_model(folder)).values()}):
        digest.update(path.name.encode())
        with path.open("rb") as file:
            while part := file.read(_READ_BYTES):
                digest.update(part)
    return digest.hexdigest()


def read_model_state(run_dir: Path | str, step: int | None = None) -> ModelState:
    """Weights of a run for export or generation: no process group, one whole tensor in memory at a time.

    Args:
        run_dir: the run's folder, or the URL of a copy of it: its checkpoint is fetched into the local cache.
        step: of which checkpoint; None takes the newest whole one, and warns about newer damaged ones.

    Raises:
        InputError: no checkpoint there, or the one asked for is damaged. MachineError: the store of a URL cannot be
            reached, or no room for what is fetched.
    """
    if isinstance(run_dir, str) and is_remote(run_dir):
        run_dir, step = fetch_to_cache(run_dir, step)
    root = CheckpointFolder(Path(run_dir) / "checkpoints")
    manifest, damages = good_checkpoint(root, step)
    warn_of(damages, manifest.step)
    folder = root.path_of(manifest.step)
    tokenizer = folder / TOKENIZER_FILE
    reader = StateReader(folder / STATE_FOLDER)
    shapes = {name: shape for name, shape in reader.shapes().items() if name.startswith(MODEL_PREFIX)}
    where = f"{folder}/{MANIFEST_FILE}"
    config, adapter = model_from_dict(manifest.model, where), adapter_from_dict(manifest.model, where)
    trunk_digest = manifest.model.get(TRUNK_DIGEST)
    num_stored = sum(math.prod(shape) for shape in shapes.values())
    wanted = num_adapter_params(config, adapter) + (0 if trunk_digest else num_params(config))
    if wanted != num_stored:  # before a model of that size is built
        raise InputError(
            f"{folder}: {MANIFEST_FILE} describes a model of {wanted} parameters, the files hold {num_stored}; take "
            "another checkpoint of the run",
            id=ErrorId.checkpoint_damaged,
        )
    own = tokenizer if tokenizer.is_file() else None
    return ModelState(config, manifest.step, adapter, trunk_digest, own, reader, shapes)


def model_to_dict(
    model: ModelConfig, adapter: AdapterConfig = NO_ADAPTER, trunk_digest: str | None = None
) -> dict[str, Any]:
    """JSON form of a ModelConfig, and of the adapters on it where there are any."""
    values = {**asdict(model), "family": model.family.value}
    if adapter.is_on:
        values |= {ADAPTER: {**asdict(adapter), "kind": adapter.kind.value}, TRUNK_DIGEST: trunk_digest}
    if model.rope_scaling is not None:
        values["rope_scaling"]["type"] = model.rope_scaling.type.value
    return values


def model_from_dict(values: Mapping[str, Any], where: str = "the model's values") -> ModelConfig:
    """Inverse of model_to_dict.

    Raises:
        InputError: they are not those of a model; names `where`.
    """
    values = {name: value for name, value in values.items() if name not in (ADAPTER, TRUNK_DIGEST)}
    try:
        scaling = values["rope_scaling"]
        if scaling is not None:
            kind = RopeType(scaling.get("type", RopeType.llama3.value))
            scaling = _checked(RopeScaling(**{**scaling, "type": kind}))
        return _checked(ModelConfig(**{**values, "family": Family(values["family"]), "rope_scaling": scaling}))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{where}: does not describe a model ({error}); take another checkpoint of the run") from error


def adapter_from_dict(values: Mapping[str, Any], where: str = "the model's values") -> AdapterConfig:
    """The adapters of what model_to_dict made. Raises as model_from_dict."""
    if ADAPTER not in values:
        return NO_ADAPTER
    try:
        adapter = values[ADAPTER]
        return _checked(AdapterConfig(**{**adapter, "kind": AdapterKind(adapter["kind"])}))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{where}: does not describe adapters ({error}); take another checkpoint of the run"
        ) from error


_Config = TypeVar("_Config", ModelConfig, RopeScaling, AdapterConfig)


def _checked(config: _Config) -> _Config:
    """Refuse values that the annotations do not allow, and sizes that no model has."""
    for name, hint in get_type_hints(type(config)).items():
        given, kinds = getattr(config, name), set(get_args(hint)) or {hint}
        kinds |= {int} if float in kinds else set()
        if (get_origin(hint) is list) != isinstance(given, list):
            raise ValueError(f"{name}={given!r}")
        for value in given if isinstance(given, list) else [given]:
            if type(value) not in kinds or (type(value) is int and value < (0 if name == "pad_token_id" else 1)):
                raise ValueError(f"{name}={given!r}")
    return config
