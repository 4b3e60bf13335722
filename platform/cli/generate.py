"""`headrace generate`: continue a text with a trained model."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headrace.platform.config.words import environment_words
from headrace.platform.keys import pick, pick_dtype, read_keys, split_flags
from headrace.storage.core.errors import InputError, MachineError
from headrace.storage.remote.folder import is_remote
from headrace.workers.model.weight_files import check_model_folder
from headrace.workers.train.checkpoint_folder import CheckpointFolder, require_checkpoint

if TYPE_CHECKING:
    import torch

    from headrace.workers.model.decoder import Decoder
    from headrace.workers.model.tokenizer import TextTokenizer

USAGE = """\
usage: headrace generate run=DIR|hf=DIR --prompt "TEXT" [KEY=VALUE ...] [--json]

  run=DIR             a run's newest committed checkpoint, or that of step=N
  hf=DIR              a Hugging Face folder with its tokenizer.json
                      either may be a URL, such as s3://bucket/folder
  max_new_tokens=64
  temperature=0.8     randomness of the answer; 0 takes the most probable token (small models then repeat themselves)
  top_p=0.95          sample from the most probable tokens that together have this probability; top_k= among that many
  seed=0              seed of the random numbers; the same words give the same text
  dtype=fp32|bf16     default: fp32 on the CPU, bf16 on a GPU
  device=auto|cpu|cuda
"""
KEYS: dict[str, type] = {
    "run": str,
    "hf": str,
    "step": int,
    "prompt": str,
    "max_new_tokens": int,
    "temperature": float,
    "top_k": int,
    "top_p": float,
    "seed": int,
    "dtype": str,
    "device": str,
}
SAMPLING_KEYS = ("max_new_tokens", "temperature", "top_k", "top_p", "seed")
SAMPLING: dict[str, Any] = {"temperature": 0.8, "top_p": 0.95}  # the defaults
DTYPES = {"fp64": "float64", "fp32": "float32", "bf16": "bfloat16"}


def run(argv: Sequence[str]) -> int:
    """Run `headrace generate ...`.

    Args:
        argv: words after `generate`; those of HEADRACE_OVERRIDES come before them.

    Raises:
        InputError: unknown or missing words, or a model that cannot be used. MachineError: device=cuda without one.
    """
    words, prompt = _take_prompt(argv)
    flags, words = split_flags(words, ("--json", "--prompt"))
    values = read_keys([*environment_words(os.environ), *words], KEYS)
    prompt = values.pop("prompt", None) if prompt is None else prompt
    if ("run" in values) == ("hf" in values):
        raise InputError(f"give either run=DIR or hf=DIR\n\n{USAGE}")
    if not prompt:
        raise InputError('the prompt is missing; give --prompt "TEXT"')
    check_before_torch(values)
    facts = _generate(values, prompt)
    if "--json" in flags:
        print(json.dumps(facts), flush=True)
    else:
        print(prompt + facts["text"])
    return 0


def check_before_torch(values: Mapping[str, Any]) -> None:
    """Look whether `run` or `hf` names what can be read; loading torch takes longer than a user waits for a typo.

    Raises:
        InputError: no checkpoint, or no model folder, is there; or a step of a folder without steps.
    """
    if "hf" in values:
        if "step" in values:
            raise InputError(f"step={values['step']}: a Hugging Face folder has no steps; leave it out")
        check_model_folder(values["hf"])
    elif not is_remote(values["run"]):
        require_checkpoint(CheckpointFolder(Path(values["run"]) / "checkpoints"), values.get("step"))


def _take_prompt(argv: Sequence[str]) -> tuple[list[str], str | None]:
    """The word after --prompt, which may hold anything, and the other words."""
    words = list(argv)
    for place, word in enumerate(words):
        if word == "--prompt":
            if place + 1 == len(words):
                raise InputError('--prompt has no text; give --prompt "TEXT"')
            return words[:place] + words[place + 2 :], words[place + 1]
        if word.startswith("--prompt="):
            return words[:place] + words[place + 1 :], word.removeprefix("--prompt=")
    return words, None


def _generate(values: dict[str, Any], prompt: str) -> dict[str, Any]:
    from headrace.workers.model.generation import SamplingConfig, generate

    drawn = {} if values.get("temperature") == 0 else SAMPLING
    sampling = SamplingConfig(**{**drawn, **{key: values[key] for key in SAMPLING_KEYS if key in values}})
    name, dtype_name = pick("device", values.get("device", "auto"), ("auto", "cpu", "cuda")), values.get("dtype")
    if dtype_name is not None:
        dtype_name = pick_dtype("dtype", dtype_name, ("fp32", "bf16"))
    device, dtype = device_and_dtype(name, dtype_name)
    if "run" in values:
        model, tokenizer = _from_run(values["run"], values.get("step"), device, dtype)
    else:
        model, tokenizer = _from_hf(values["hf"], device, dtype)
    tokens, stops = tokenizer.encode(prompt), set(tokenizer.stop_ids)
    begin = time.perf_counter()
    new = generate(model, tokens, sampling, stop_tokens=stops)
    seconds = time.perf_counter() - begin
    return {
        "prompt": prompt,
        "text": tokenizer.decode(new),
        "tokens": new,
        "num_prompt_tokens": len(tokens),
        "stopped": new[-1] in stops,
        "tokens_per_s": round(len(new) / seconds, 2),
    }


def device_and_dtype(device: str, dtype: str | None) -> tuple[torch.device, torch.dtype]:
    """What `device` (auto, cpu, cuda) and `dtype` (one of DTYPES) mean on this machine.

    Args:
        dtype: None: fp32 on the CPU, bf16 on a GPU.

    Raises:
        MachineError: device=cuda without one.
    """
    import torch

    has_gpu = torch.cuda.is_available()
    if device == "cuda" and not has_gpu:
        raise MachineError("device=cuda: there is no CUDA device; leave it out")
    found = torch.device("cuda" if has_gpu and device != "cpu" else "cpu")
    return found, getattr(torch, DTYPES[dtype or ("bf16" if found.type == "cuda" else "fp32")])


def _from_run(
    run_dir: str, step: int | None, device: torch.device, dtype: torch.dtype
) -> tuple[Decoder, TextTokenizer]:
    from headrace.workers.model.decoder import Decoder
    from headrace.workers.model.sharded import copy_weights
    from headrace.workers.model.tokenizer import load_tokenizer
    from headrace.workers.train.model_state import read_model_state

    state = read_model_state(run_dir, step)
    if state.tokenizer is None:
        raise InputError(f"run={run_dir}: its checkpoint has no tokenizer.json; export it and add one")
    model = Decoder(state.config, dtype=dtype, device=device, adapter=state.adapter).eval()
    copy_weights(model, state.tensors)
    return model, load_tokenizer(state.tokenizer)


def _from_hf(given: str, device: torch.device, dtype: torch.dtype) -> tuple[Decoder, TextTokenizer]:
    from headrace.workers.model.decoder import Decoder
    from headrace.workers.model.hf import load_config, load_weights
    from headrace.workers.model.remote_model import local_model
    from headrace.workers.model.tokenizer import load_tokenizer

    folder = local_model(given)
    model = Decoder(load_config(folder), dtype=dtype, device=device)
    tokenizer = load_tokenizer(folder)
    load_weights(model, folder)
    return model, tokenizer
