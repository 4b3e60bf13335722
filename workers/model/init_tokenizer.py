"""A run that starts from pretrained weights reads ids of the tokenizer that those were trained with. No torch."""

from __future__ import annotations

import warnings
from dataclasses import replace

from headrace.storage.core.errors import ErrorId, InputError
from headrace.workers.data.config import DataConfig
from headrace.workers.data.opening import open_prepared
from headrace.workers.data.tokenizer_files import COMPANIONS, MODEL_FILE, TOKENIZER_FILE, read_tokenizer_files
from headrace.workers.model.remote_model import local_model


def data_for_model(data: DataConfig, init_from: str | None) -> DataConfig:
    """The data settings of a run: with `init_from`, the folder's tokenizer where no other is named.

    Args:
        init_from: Hugging Face folder, or its URL; only the tokenizer's files are fetched.

    Raises:
        InputError: another tokenizer than the folder's, unless data.allow_other_tokenizer is set; or no tokenizer
            anywhere. MachineError: the store of a URL cannot be reached.
    """
    if init_from is None:
        return data
    folder = local_model(init_from, (TOKENIZER_FILE, *COMPANIONS, MODEL_FILE))
    is_there = (folder / TOKENIZER_FILE).is_file()
    if data.prepared is not None:
        key, digest = f"data.prepared={data.prepared}", open_prepared(data.prepared).tokenizer_digest
    elif data.tokenizer is not None:
        key, digest = f"data.tokenizer={data.tokenizer}", read_tokenizer_files(data.tokenizer).digest
    elif is_there:
        return replace(data, tokenizer=str(folder))
    else:
        raise InputError(
            f"model.init_from={init_from}: no {TOKENIZER_FILE} in it; put the one there that its weights were trained "
            "with, or name it with data.tokenizer",
            id=ErrorId.other_tokenizer,
        )
    if not is_there:
        warnings.warn(f"model.init_from={init_from}: no {TOKENIZER_FILE} in it to compare {key} with", stacklevel=2)
        return data
    wanted = read_tokenizer_files(folder).digest
    if digest != wanted and not data.allow_other_tokenizer:
        raise InputError(
            f"{key}: its tokenizer ({digest[:12]}) is not that of model.init_from={init_from} ({wanted[:12]}), whose "
            "weights belong to other ids. Leave data.prepared and data.tokenizer out: the model's tokenizer is used. "
            "Set data.allow_other_tokenizer=true only if the ids mean the same",
            id=ErrorId.other_tokenizer,
        )
    return data
