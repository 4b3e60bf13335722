"""`headrace export`: a trained model as a Hugging Face folder."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from headrace.platform.cli.generate import check_before_torch
from headrace.platform.config.words import environment_words
from headrace.platform.keys import pick_dtype, read_keys, split_flags
from headrace.storage.core.errors import InputError
from headrace.storage.remote.folder import refuse_remote
from headrace.workers.model.adapter import num_adapter_params, num_params

USAGE = """\
usage: headrace export run=DIR|URL out=DIR [step=N] [dtype=fp32|bf16|fp16] [merge=true] [--json]

Writes config.json, safetensors and the tokenizer of a run's newest committed checkpoint (or of step N) into a new
folder that transformers' from_pretrained reads. run=s3://bucket/folder fetches the checkpoint first.
dtype: of the weights; fp32, as they were trained, if not given.
A run with adapter=lora is written as an adapter in PEFT's format; merge=true adds it to the model that it stands on,
and writes that.
"""
KEYS: dict[str, type] = {"run": str, "out": str, "step": int, "dtype": str, "merge": bool}
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def run(argv: Sequence[str]) -> int:
    """Run `headrace export ...`.

    Args:
        argv: words after `export`; those of HEADRACE_OVERRIDES come before them.

    Raises:
        InputError: unknown or missing words, no checkpoint there, or an `out` that exists. MachineError: no room.
    """
    flags, words = split_flags(argv, ("--json",))
    values = read_keys([*environment_words(os.environ), *words], KEYS)
    for key in ("run", "out"):
        if key not in values:
            raise InputError(f"{key}=DIR is missing\n\n{USAGE}")
    refuse_remote("out", values["out"])
    check_before_torch(values)
    dtype = pick_dtype("dtype", values.get("dtype", "fp32"), tuple(DTYPES))
    merge = values.get("merge", False)
    facts = _export(values["run"], Path(values["out"]), values.get("step"), DTYPES[dtype], merge=merge)
    if "--json" in flags:
        print(json.dumps(facts), flush=True)
    else:
        print(f"{facts['folder']}: {facts['num_params']:,} parameters in {dtype}, {facts['bytes'] / 1024**2:,.1f} MiB")
    return 0


def _export(run_dir: str, out: Path, step: int | None, dtype: str, *, merge: bool) -> dict[str, Any]:
    import torch

    from headrace.workers.model.hf import save_pretrained
    from headrace.workers.model.peft_files import save_adapter
    from headrace.workers.model.tokenizer import load_tokenizer
    from headrace.workers.train.model_state import read_model_state

    if out.exists():
        raise InputError(f"out={out}: exists already; give another folder, or remove it")
    state = read_model_state(run_dir, step)
    config, adapter = state.config, state.adapter
    if merge and not adapter.is_on:
        raise InputError("merge=true: the run trained no adapter, its weights are whole already; leave merge out")
    tokenizer = None if state.tokenizer is None else load_tokenizer(state.tokenizer)
    files = {} if tokenizer is None else tokenizer.files_for_transformers()
    kind, more_config = getattr(torch, dtype), {} if tokenizer is None else tokenizer.ids_for_transformers()
    is_adapter = adapter.is_on and not merge
    if is_adapter:
        save_adapter(state.adapters, adapter, out, trunk=config.init_from, dtype=kind, tokenizer=files)
    else:
        weights = state.merged if merge else state.tensors
        save_pretrained(weights, config, out, dtype=kind, tokenizer=files, more_config=more_config)
    return {
        "folder": str(out),
        "model": config.name,
        "family": config.family.value,
        "num_params": num_adapter_params(config, adapter) if is_adapter else num_params(config),
        "dtype": dtype,
        "bytes": sum(file.stat().st_size for file in out.iterdir()),
        "has_tokenizer": tokenizer is not None,
    }
