"""What `headrace eval` evaluates: a run's checkpoint, a model folder or first weights, and the rows for it."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headrace.platform.cli.generate import check_before_torch
from headrace.platform.config.load import CONFIG_FILE, LoadedConfig, load_run_config, load_saved_config
from headrace.platform.config.schema import RunConfig
from headrace.platform.tracking.run_folder import find_run
from headrace.storage.core.errors import InputError
from headrace.storage.remote.folder import is_remote, open_remote
from headrace.workers.data.progress import progress_bar
from headrace.workers.evaluate.config import EvalConfig, EvalSplit

if TYPE_CHECKING:
    import torch

    from headrace.workers.data.loader import TokenLoader
    from headrace.workers.model.decoder import Decoder
    from headrace.workers.train.model_state import ModelState

# Keys of `data` that change no row.
SAME_ROWS = ("data.loader", "data.eval_fraction", "data.name", "data.cache_dir", "data.allow_other_tokenizer")


@dataclass(frozen=True)
class Subject:
    """What is evaluated.

    Args:
        loaded: configuration of the run, or of the words.
        run_dir: local folder of the run, if it is one.
        state: of the run's checkpoint.
    """

    loaded: LoadedConfig
    run_dir: Path | None = None
    state: ModelState | None = None

    @property
    def step(self) -> int | None:
        """Of the checkpoint."""
        return None if self.state is None else self.state.step


def find_subject(values: Mapping[str, Any], rest: Sequence[str]) -> Subject:
    """What the words name, its configuration read and checked.

    Raises:
        InputError: no such run, checkpoint or folder, or words that the configuration refuses.
    """
    if "hf" in values:
        check_before_torch({"hf": values["hf"]})
        return Subject(load_run_config([f"model.init_from={values['hf']}", *rest], environ={}))
    if "run" not in values:
        return Subject(load_run_config(rest, environ={}))
    given, step = str(values["run"]), values.get("step")
    if is_remote(given):
        from headrace.workers.train.remote_checkpoint import fetch_to_cache

        run_dir, step = fetch_to_cache(given, step)
        (run_dir / CONFIG_FILE).write_bytes(open_remote(given).read(CONFIG_FILE))
    else:
        run_dir = find_run(given)
        check_before_torch({"run": run_dir, "step": step} if step is not None else {"run": str(run_dir)})
    loaded = load_saved_config(run_dir / CONFIG_FILE, rest, environ={})
    from headrace.workers.train.model_state import read_model_state

    return Subject(loaded, run_dir, read_model_state(run_dir, step))


def with_data(subject: Subject, config: EvalConfig, rest: Sequence[str]) -> RunConfig:
    """The configuration with the data prepared.

    Raises:
        InputError: rows of several lengths, another tokenizer than the model's, or bad data.
    """
    from headrace.platform.control.job import resolve
    from headrace.workers.data.prepare import prepare
    from headrace.workers.model.init_tokenizer import data_for_model

    run_config, state = subject.loaded.config, subject.state
    data = run_config.data
    other_rows = any(word.startswith("data.") and not has_key([word], *SAME_ROWS) for word in rest)
    if state is not None and other_rows and not has_key(rest, "data.prepared"):
        if state.tokenizer is None and not has_key(rest, "data.tokenizer"):
            raise InputError(f"{subject.run_dir}: its checkpoint has no tokenizer.json; name one with data.tokenizer=")
        own = data.tokenizer if has_key(rest, "data.tokenizer") else str(state.tokenizer)
        data = replace(data, prepared=None, tokenizer=own)
        if config.split is EvalSplit.held_out:
            print(
                "headrace eval: warning: rows are held out by number: these, cut anew, may hold text that the run was "
                "trained on; name other data with data.source=",
                file=sys.stderr,
            )
    if data.buckets:
        raise InputError(
            f"data.buckets={data.buckets}: eval reads rows of one length; add data.buckets=[] and data.seq_len=N"
        )
    if state is None:
        data = data_for_model(data, run_config.model.init_from)
    with progress_bar() as progress:
        prepared = prepare(data, progress=progress)
    if state is not None:
        _check_tokenizer(state, prepared.tokenizer_digest, data.allow_other_tokenizer)
        run_config = replace(run_config, model=state.config, adapter=state.adapter)
    return resolve(replace(run_config, data=data), prepared)


def _check_tokenizer(state: ModelState, digest: str, allow_other: bool) -> None:
    from headrace.workers.data.tokenizer_files import read_tokenizer_files

    if state.tokenizer is None or allow_other:
        return
    wanted = read_tokenizer_files(state.tokenizer).digest
    if digest != wanted:
        raise InputError(
            f"the data's tokenizer ({digest[:12]}) is not that of the run ({wanted[:12]}), whose weights belong to "
            "other ids; leave data.prepared and data.tokenizer out, or set data.allow_other_tokenizer=true if the ids "
            "mean the same"
        )


def open_rows(run_config: RunConfig, config: EvalConfig) -> TokenLoader:
    """The rows of the split, one a batch.

    Raises:
        InputError: no row in the split.
    """
    from headrace.workers.data.config import Loader
    from headrace.workers.data.loader import open_loader
    from headrace.workers.train.config import TrainConfig

    data = replace(run_config.data, loader=Loader.memmap)
    train = TrainConfig(batch_size=1, micro_batches=1, seed=0)
    if config.split is EvalSplit.all:
        data = replace(data, eval_fraction=0.0)
    split = "eval" if config.split is EvalSplit.held_out else "train"
    return open_loader(data, train=train, rank=0, world_size=1, split=split)


def load_model(subject: Subject, run_config: RunConfig, device: torch.device, dtype: torch.dtype) -> Decoder:
    """The decoder with the weights of the subject, in evaluation mode.

    Raises:
        InputError: they cannot be read, or are those of another model.
    """
    from headrace.kernels.api import Operators
    from headrace.workers.model.decoder import Decoder
    from headrace.workers.model.sharded import copy_weights
    from headrace.workers.train.weights import fill_weights

    train = run_config.train
    operators = Operators(attention=train.attention, kernels=train.kernels)
    adapter = run_config.adapter
    model = Decoder(run_config.model, dtype=dtype, device="meta", operators=operators, adapter=adapter)
    if subject.state is not None:
        model.to_empty(device=device)
        copy_weights(model, subject.state.tensors)
    else:
        fill_weights(model, run_config.model, seed=train.seed, device=device, adapter=adapter)
    return model.eval()


def has_key(words: Sequence[str], *keys: str) -> bool:
    """Whether a word sets one of the keys."""
    return any(word.partition("=")[0] in keys for word in words)
