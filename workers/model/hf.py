"""Weights of Hugging Face folders (safetensors, sharded or not): read tensor by tensor, written shard by shard."""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from headrace.storage.core.errors import InputError, MachineError
from headrace.workers.model.config import ModelConfig
from headrace.workers.model.decoder import Decoder
from headrace.workers.model.hf_config import CONFIG_FILE, config_to_hf, load_config
from headrace.workers.model.remote_model import local_model
from headrace.workers.model.sharded import copy_weights
from headrace.workers.model.weight_files import INDEX_FILE, WEIGHTS_FILE, WeightEntry, read_headers

__all__ = ["hf_name", "iter_weights", "load_config", "load_weights", "save_pretrained"]

HEAD = "lm_head.weight"
DEFAULT_SHARD_BYTES = 5_000_000_000
# Tables that old transformers saved beside the weights.
_DERIVED = ("rotary_emb.inv_freq", "attention.bias", "attention.masked_bias")


def hf_name(name: str) -> str:
    """transformers' name of one of our parameters."""
    return name if name == HEAD else "model." + name.replace("blocks.", "layers.", 1)


def load_weights(model: nn.Module, folder: Path | str) -> None:
    """Copy the weights of a Hugging Face folder into a Decoder, sharded (FSDP2) or whole; one tensor at a time.

    Raises:
        InputError: see iter_weights.
    """
    config: ModelConfig = model.config  # type: ignore[assignment]
    copy_weights(model, iter_weights(folder, config))


def iter_weights(folder: Path | str, config: ModelConfig) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter of a Decoder of `config` once: (our name, whole tensor in the dtype of the file).

    All headers are checked before the first tensor comes. The tensors are views of mapped files: a reader that takes a
    part reads only that part from the disk. The folder of a URL is copied into the local cache first.

    Raises:
        InputError: a file missing, cut short or unreadable; a tensor missing, too many or of another shape; names the
            file and the tensor.
    """
    folder = local_model(folder)
    entries = read_headers(folder)
    wanted = {hf_name(name): (name, tuple(p.shape)) for name, p in Decoder(config, device="meta").named_parameters()}
    _check(folder, entries, wanted, config)
    return _tensors(entries, wanted, config)


def _tensors(
    entries: Mapping[str, WeightEntry], wanted: Mapping[str, tuple[str, tuple[int, ...]]], config: ModelConfig
) -> Iterator[tuple[str, torch.Tensor]]:
    """File by file, so that one file is mapped at a time."""
    for file in sorted({entries[name].file for name in wanted}):
        with open_tensors(file) as opened:
            for name in (name for name in wanted if entries[name].file == file):
                yield wanted[name][0], read_tensor(opened, file, name)
    if config.tie_embeddings and HEAD in entries:
        embedding = hf_name("embed_tokens.weight")
        first, second = (entries[name].file for name in (embedding, HEAD))
        with open_tensors(first) as a, open_tensors(second) as b:
            if not torch.equal(read_tensor(a, first, embedding), read_tensor(b, second, HEAD)):
                raise InputError(
                    f"{second}: {HEAD} differs from {embedding}, and {CONFIG_FILE} ties them; set "
                    "tie_word_embeddings to false there"
                )


def open_tensors(file: Path) -> Any:
    """A safetensors file, mapped. Raises InputError where it cannot be read."""
    try:
        return safe_open(file, framework="pt", device="cpu")
    except (OSError, SafetensorError) as error:
        raise InputError(f"{file}: cannot be read ({error}); fetch it again") from error


def read_tensor(opened: Any, file: Path, name: str) -> torch.Tensor:
    """One tensor of an open file. Raises InputError where it cannot be read."""
    try:
        return opened.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{file}: tensor {name} cannot be read ({error}); fetch the file again") from error


def _check(
    folder: Path,
    entries: Mapping[str, WeightEntry],
    wanted: Mapping[str, tuple[str, tuple[int, ...]]],
    config: ModelConfig,
) -> None:
    """Refuse a folder that does not hold exactly this model."""
    for name, (_, shape) in wanted.items():
        if name not in entries:
            remedy = "set tie_word_embeddings to true in config.json" if name == HEAD else "fetch the folder again"
            raise InputError(f"{folder}: tensor {name} of shape {shape} is missing; {remedy}")
        if entries[name].shape != shape:
            raise InputError(
                f"{entries[name].file}: tensor {name} has shape {entries[name].shape}, the model needs {shape}; give "
                "the config that came with the weights"
            )
    for name in sorted(set(entries) - set(wanted)):
        is_tied_head = config.tie_embeddings and name == HEAD
        if is_tied_head and entries[name].shape != (config.vocab_size, config.hidden_size):
            raise InputError(f"{entries[name].file}: tensor {name} has shape {entries[name].shape}, and it is tied")
        if not is_tied_head and not name.endswith(_DERIVED):
            raise InputError(
                f"{entries[name].file}: tensor {name} of shape {entries[name].shape} is not part of a "
                f"{config.family.value} model of {config.num_layers} layers; give the config that came with the weights"
            )


def save_pretrained(
    state: Iterable[tuple[str, torch.Tensor]],
    config: ModelConfig,
    folder: Path | str,
    *,
    dtype: torch.dtype | None = None,
    tokenizer: Mapping[str, bytes] | None = None,
    more_config: Mapping[str, Any] | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> None:
    """Write a folder that transformers' from_pretrained reads. It appears whole or not at all.

    Args:
        state: every parameter once, by our name; at most one shard of it is held in memory.
        folder: must not exist.
        dtype: of the file; None keeps that of the tensors.
        tokenizer: further files by name: tokenizer.json and its companions.
        more_config: further keys of config.json.

    Raises:
        InputError: the folder exists, or `state` is not the state of this model.
        MachineError: no room on the disk, or no right to write there. Nothing is left.
    """
    with new_folder(Path(folder)) as temporary:
        names, dtype_name = _write_shards(state, config, temporary, dtype, max_shard_bytes)
        _finish_shards(temporary, names)
        content = config_to_hf(config, dtype_name, **(more_config or {}))
        (temporary / CONFIG_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        for name, data in (tokenizer or {}).items():
            (temporary / name).parent.mkdir(exist_ok=True)
            (temporary / name).write_bytes(data)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to write into that becomes `folder` at the end, or is gone.

    Raises:
        InputError: the folder exists. MachineError: no room on the disk, or no right to write there.
    """
    if folder.exists():
        raise InputError(f"{folder}: exists already; give another folder, or remove it")
    temporary = folder.parent / f".{folder.name}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        yield temporary
        temporary.rename(folder)
    except (OSError, SafetensorError) as error:
        raise MachineError(
            f"{folder}: could not be written ({error}); give a folder with room, or free some"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_shards(
    state: Iterable[tuple[str, torch.Tensor]],
    config: ModelConfig,
    folder: Path,
    dtype: torch.dtype | None,
    max_shard_bytes: int,
) -> tuple[list[dict[str, int]], str]:
    """Write shard after shard; returns what each holds (name to bytes), and the dtype as config.json spells it."""
    missing = {name: tuple(p.shape) for name, p in Decoder(config, device="meta").named_parameters()}
    shards: list[dict[str, int]] = []
    pending: dict[str, torch.Tensor] = {}
    dtypes: set[torch.dtype] = set()

    def flush() -> None:
        if pending:
            file = folder / _draft(len(shards))
            save_file(pending, file, metadata={"format": "pt"})
            # safetensors makes files for their owner only; who may read the folder may read the model.
            file.chmod(folder.stat().st_mode & 0o666)
            shards.append({name: tensor.nbytes for name, tensor in pending.items()})
            pending.clear()

    for name, tensor in state:
        shape = missing.pop(name, None)
        if shape != tuple(tensor.shape):
            raise InputError(f"tensor {name} of shape {tuple(tensor.shape)}: the model has {shape} there")
        tensor = tensor.detach().to(device="cpu", dtype=dtype or tensor.dtype)
        if sum(t.nbytes for t in pending.values()) + tensor.nbytes > max_shard_bytes:
            flush()
        dtypes.add(tensor.dtype)
        pending[hf_name(name)] = tensor.contiguous()
    flush()
    if missing:
        raise InputError(f"tensor {min(missing)} of shape {missing[min(missing)]}: not given")
    return shards, str(sorted(dtypes, key=str)[0]).removeprefix("torch.")


def _draft(number: int) -> str:
    return f"shard{number}.safetensors"


def _finish_shards(folder: Path, shards: list[dict[str, int]]) -> None:
    """Give the shards the names that transformers looks for, and more than one their index."""
    if len(shards) == 1:
        (folder / _draft(0)).rename(folder / WEIGHTS_FILE)
        return
    weight_map: dict[str, str] = {}
    for number, sizes in enumerate(shards):
        name = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / _draft(number)).rename(folder / name)
        weight_map |= dict.fromkeys(sizes, name)
    index = {"metadata": {"total_size": sum(sum(sizes.values()) for sizes in shards)}, "weight_map": weight_map}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
