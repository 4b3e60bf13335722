"""Adapters in PEFT's format: adapter_config.json and adapter_model.safetensors, read and written; and merged away."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from headrace.storage.core.errors import InputError
from headrace.workers.model.config import AdapterConfig, ModelConfig
from headrace.workers.model.decoder import Decoder
from headrace.workers.model.hf import hf_name, new_folder, open_tensors, read_tensor
from headrace.workers.model.lora import LORA_A, LORA_B, is_adapter, merged
from headrace.workers.model.peft_config import ADAPTER_CONFIG, ADAPTER_WEIGHTS, check_adapter_weights, peft_config
from headrace.workers.model.weight_files import read_header


def peft_name(name: str) -> str:
    """PEFT's name of one of our adapter parameters."""
    return "base_model.model." + hf_name(name)


def adapter_shapes(config: ModelConfig, adapter: AdapterConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every adapter parameter by our name."""
    model = Decoder(config, device="meta", adapter=adapter)
    return {name: tuple(param.shape) for name, param in model.named_parameters() if is_adapter(name)}


def iter_adapter(folder: Path | str, config: ModelConfig, adapter: AdapterConfig) -> Iterator[tuple[str, torch.Tensor]]:
    """Every adapter parameter once: (our name, whole tensor in the dtype of the file). Headers are checked first.

    Raises:
        InputError: no file, a tensor missing, too many or of another shape; names the file and the tensor.
    """
    path = Path(folder) / ADAPTER_WEIGHTS
    check_adapter_weights(folder)
    entries = read_header(path)
    wanted = {peft_name(name): (name, shape) for name, shape in adapter_shapes(config, adapter).items()}
    for name, (_, shape) in wanted.items():
        if name not in entries or entries[name].shape != shape:
            found = f"has shape {entries[name].shape}" if name in entries else "is missing"
            raise InputError(f"{path}: tensor {name} {found}, the run wants {shape}; give the adapter of this model")
    if stray := sorted(entries.keys() - wanted.keys()):
        raise InputError(
            f"{path}: tensor {stray[0]} of shape {entries[stray[0]].shape} is not part of the adapter that "
            f"{ADAPTER_CONFIG} describes; give the adapter of this model"
        )

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        with open_tensors(path) as opened:
            for name, (ours, _) in wanted.items():
                yield ours, read_tensor(opened, path, name)

    return tensors()


def save_adapter(
    state: Iterable[tuple[str, torch.Tensor]],
    adapter: AdapterConfig,
    folder: Path | str,
    *,
    trunk: str | None,
    dtype: torch.dtype | None = None,
    tokenizer: Mapping[str, bytes] | None = None,
) -> None:
    """Write a folder that PEFT's from_pretrained reads. It appears whole or not at all.

    Args:
        state: every adapter parameter once, by our name.
        trunk: folder of the model that the adapter stands on; None where nobody knows one.
        dtype: of the file; None keeps that of the tensors.
        tokenizer: further files by name.

    Raises:
        InputError: the folder exists. MachineError: no room on the disk, or no right to write there.
    """
    with new_folder(Path(folder)) as temporary:
        tensors = {peft_name(n): t.detach().to("cpu", dtype or t.dtype).contiguous() for n, t in state}
        save_file(tensors, temporary / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        (temporary / ADAPTER_WEIGHTS).chmod(temporary.stat().st_mode & 0o666)
        text = json.dumps(peft_config(adapter, trunk), indent=2) + "\n"
        (temporary / ADAPTER_CONFIG).write_text(text, encoding="utf-8")
        for name, data in (tokenizer or {}).items():
            (temporary / name).parent.mkdir(exist_ok=True)
            (temporary / name).write_bytes(data)


def iter_merged(
    trunk: Iterable[tuple[str, torch.Tensor]], adapters: Iterable[tuple[str, torch.Tensor]], adapter: AdapterConfig
) -> Iterator[tuple[str, torch.Tensor]]:
    """The parameters of the model without adapters that computes the same: W + s B A, taken in fp32.

    All adapters are in memory at once, the trunk tensor by tensor.
    """
    pairs = dict(adapters)
    for name, weight in trunk:
        stem = name.removesuffix("weight")
        if stem + LORA_A in pairs:
            a, b = pairs.pop(stem + LORA_A), pairs.pop(stem + LORA_B)
            weight = merged(weight.float(), a, b, adapter.scale)
        yield name, weight
