"""`headrace eval`: loss and perplexity of a model on given data, by position in the document, at any length."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from headrace.platform.cli.eval_subject import Subject, find_subject, has_key, load_model, open_rows, with_data
from headrace.platform.cli.generate import device_and_dtype
from headrace.platform.cli.plan import ssd_folders
from headrace.platform.config.load import config_text
from headrace.platform.config.schema import RunConfig
from headrace.platform.config.words import environment_words
from headrace.platform.keys import read_keys, split_flags
from headrace.platform.tracking.run_folder import write_json
from headrace.storage.core.errors import HeadraceError, InputError, MachineError
from headrace.storage.core.records import Medium
from headrace.storage.remote.folder import is_remote, refuse_remote
from headrace.workers.evaluate.config import EvalConfig, EvalSplit, check_config
from headrace.workers.memory.config import MemoryPreset

if TYPE_CHECKING:
    from headrace.workers.data.batch import TokenBatch
    from headrace.workers.data.loader import TokenLoader
    from headrace.workers.evaluate.positions import PositionLosses
    from headrace.workers.model.decoder import Decoder

USAGE = """\
usage: headrace eval run=DIR|URL|last [step=N] [KEY=VALUE ...] [--json]
       headrace eval hf=DIR|URL data.source=FILE|FOLDER [KEY=VALUE ...] [--json]
       headrace eval [conf=EXPERIMENT|FILE.yaml] [KEY=VALUE ...] [--json]   the first weights of a configuration

Loss and perplexity on token rows of any length, for all tokens and by position in the document. No Ray, one process.

  data.X=...             as `headrace train` takes them. Without data.source and data.prepared a run is evaluated on the
                         rows that it held out of training
  data.seq_len=N         tokens of a row; a run's data is prepared again with the run's tokenizer
  split=held_out|all     rows held out (data.eval_fraction), or all; default: held_out for a run's own data, else all
  rows=N                 at most so many rows; default: all
  memory=chunk|chunk_host|chunk_ssd
                         a chunk of tokens passes through all layers before the next one; keys and values of earlier
                         chunks on the device, on the host or on the SSD. Default: the run's (for chunk_auto and
                         chunk_sparse chunk_host), else chunk
  memory=keep|...        every preset by layer: the whole row passes a block at once
  chunk_size=N           tokens of a chunk; default: the run's, else 4096
  position_bucket=1024   tokens of the first bucket of positions; every next one is as long as all before it
  dtype=fp64|fp32|bf16   default: fp32 on the CPU, bf16 on a GPU
  device=auto|cpu|cuda
  out=DIR                folder of the JSON file and the picture; default: eval/ of the run's folder, or runs/eval

A run that MLflow has gets the figures there; tracking.mlflow=false leaves MLflow out.
Exit codes: 0 done, 1 the loss is not finite, 2 bad input.
"""
OWN_KEYS: dict[str, Any] = {"run": str, "hf": str, "step": int, "out": str}
OWN_KEYS |= {field.name: get_type_hints(EvalConfig)[field.name] for field in fields(EvalConfig)}
GIB = 1024**3
RUNS_DIR = Path("runs")


def run(argv: Sequence[str]) -> int:
    """Run `headrace eval ...`.

    Args:
        argv: words after `eval`; those of HEADRACE_OVERRIDES come before them.

    Returns:
        0, or 1 where the loss is not finite.

    Raises:
        InputError: unknown or missing words, a model or data that cannot be used. MachineError: no such device, no
            room.
    """
    flags, words = split_flags(argv, ("--json",))
    words = [*environment_words(os.environ), *words]
    own = [word for word in words if word.partition("=")[0] in OWN_KEYS]
    rest = [word for word in words if word not in own]
    values = read_keys(own, OWN_KEYS)
    _check_words(values)
    subject = find_subject(values, rest)
    for warning in subject.loaded.warnings:
        print(f"headrace eval: warning: {warning}", file=sys.stderr)
    return _evaluate(subject, _eval_config(values, rest, subject), values, rest, as_json="--json" in flags)


def _check_words(values: Mapping[str, Any]) -> None:
    if "run" in values and "hf" in values:
        raise InputError(f"run={values['run']} and hf={values['hf']}: give one of them")
    if "step" in values and "run" not in values:
        raise InputError(f"step={values['step']}: the step of a run's checkpoint; give run=DIR, or leave it out")
    if "out" in values:
        refuse_remote("out", values["out"])
    check_config(_over(EvalConfig(), values))


def _over(config: EvalConfig, values: Mapping[str, Any]) -> EvalConfig:
    return replace(config, **{key: value for key, value in values.items() if key in get_type_hints(EvalConfig)})


def _eval_config(values: Mapping[str, Any], rest: Sequence[str], subject: Subject) -> EvalConfig:
    """The words over the run's own choices."""
    config = EvalConfig()
    saved = subject.loaded.config
    if subject.run_dir is not None:
        preset = saved.memory.preset
        if preset.is_by_chunk:
            is_other = preset is MemoryPreset.chunk_auto or preset.is_lossy
            config.memory = MemoryPreset.chunk_host if is_other else preset
        if saved.chunk_size is not None:
            config.chunk_size = saved.chunk_size
        if not has_key(rest, "data.source", "data.prepared"):
            config.split = EvalSplit.held_out
    return _over(config, values)


def _evaluate(
    subject: Subject, config: EvalConfig, values: Mapping[str, Any], rest: Sequence[str], *, as_json: bool
) -> int:
    run_config = with_data(subject, config, rest)
    device, dtype = device_and_dtype(config.device.value, config.dtype and config.dtype.value)
    loader = open_rows(run_config, config)
    try:
        loader.data.check_vocab(run_config.model.vocab_size)
        model = load_model(subject, run_config, device, dtype)
        out = _out_folder(subject, values)
        losses, facts = _compute(model, loader, run_config, config, out)
    finally:
        loader.close()
    whole = losses.whole()
    record = {
        "model": run_config.model.name,
        "weights": _weights(subject, values, run_config),
        "step": subject.step,
        "data": {"folder": loader.data.where, "digest": loader.data.digest, "source": loader.data.source},
        "split": config.split.value,
        "seq_len": run_config.data.seq_len,
        "memory": config.memory.value,
        "chunk_size": config.chunk_size if config.memory.is_by_chunk else None,
        "dtype": str(dtype).removeprefix("torch."),
        "device": str(device),
        **{key: value for key, value in whole.to_json().items() if key not in ("begin", "end")},
        "by_position": [bucket.to_json() for bucket in losses.buckets()],
        **facts,
    }
    record |= _write(record, out, subject, run_config)
    print(json.dumps(record, allow_nan=False) if as_json else as_table(record), flush=True)
    if record["loss"] is None:
        print(f"headrace eval: the loss is {whole.loss}: weights or activations overflow {record['dtype']}; use "
              "dtype=fp32, or another checkpoint", file=sys.stderr)  # fmt: skip
        return 1
    return 0


def _weights(subject: Subject, values: Mapping[str, Any], run_config: RunConfig) -> str:
    """Where they are from, for people and programs."""
    if subject.run_dir is not None:
        return str(values["run"]) if is_remote(str(values["run"])) else str(subject.run_dir)
    return str(values.get("hf") or f"first weights, seed {run_config.train.seed}")


def _compute(
    model: Decoder, loader: TokenLoader, run_config: RunConfig, config: EvalConfig, out: Path
) -> tuple[PositionLosses, dict[str, Any]]:
    """The losses of the rows, and how they were computed."""
    from headrace.platform.tracking.progress import open_progress
    from headrace.storage.transfer_log import TransferLog
    from headrace.workers.evaluate.evaluate import eval_plan, evaluate, on_device, tier_bytes
    from headrace.workers.evaluate.positions import PositionLosses
    from headrace.workers.job import RankContext
    from headrace.workers.memory.policy import skeletons_of
    from headrace.workers.telemetry import names
    from headrace.workers.train.runtime import torch_runtime
    from headrace.workers.verify.ours import open_tiers

    seq_len, weight = run_config.data.seq_len, model.head_weight
    num_rows = min(config.rows or loader.index.epoch_rows, loader.index.epoch_rows)
    plan = eval_plan(config.memory, skeletons_of(model.blocks), seq_len, config.chunk_size)
    wanted = tier_bytes(plan, model.config, batch_size=1, seq_len=seq_len, itemsize=weight.itemsize)
    _check_budgets(wanted, run_config)
    if not any(wanted.values()):
        plan = on_device(plan, skeletons_of(model.blocks))  # no tier is opened
    losses = PositionLosses(config.position_bucket, seq_len, weight.device)
    log, folders = TransferLog(), ssd_folders(run_config, out)
    view = open_progress(run_config.tracking.progress, num_rows, verb="eval", unit="row")
    begin_s = time.perf_counter()
    view.start(0)
    try:
        with (
            torch_runtime(run_config.train, RankContext(device=weight.device.type)),
            open_tiers(wanted, weight.device, log, tiers=run_config.tiers, folders=folders) as stack,
        ):
            evaluate(
                model,
                _batches(loader, num_rows),
                plan,
                stack,
                losses,
                loss_tile=run_config.train.loss_tile,
                on_chunk=lambda stage, number, total: view.part(f"chunk {number}/{total}"),
                on_row=lambda done, whole: view.show(done, {names.LOSS_EVAL: whole.loss}),
            )
    finally:
        view.close()
        _count_wear(log, run_config, folders)
    seconds = time.perf_counter() - begin_s
    moved = {f"{way.value}/{tier.value}": count for (tier, way), count in sorted(log.moved_bytes.items(), key=str)}
    rate = round(num_rows * seq_len / seconds, 2)
    return losses, {"rows": num_rows, "seconds": round(seconds, 3), "tokens_per_s": rate, "moved_bytes": moved}


def _batches(loader: TokenLoader, num_rows: int) -> Iterator[TokenBatch]:
    for number in range(num_rows):
        yield from loader.step_batches(number)


def _check_budgets(wanted: Mapping[Medium, int], run_config: RunConfig) -> None:
    tiers = run_config.tiers
    for medium, budget in ((Medium.host, tiers.host.budget_gib), (Medium.ssd, tiers.ssd.budget_gib)):
        if budget is not None and wanted[medium] > budget * GIB:
            raise InputError(
                f"tiers.{medium.value}.budget_gib={budget:g}: keys and values of a row of data.seq_len="
                f"{run_config.data.seq_len} take {wanted[medium] / GIB:.3g} GiB there; raise it, lower data.seq_len, "
                "or choose another memory=chunk|chunk_host|chunk_ssd"
            )


def _count_wear(log: Any, run_config: RunConfig, folders: Sequence[Path]) -> None:
    """What was written counts against the life of the drive, as in training."""
    from headrace.storage.core.records import Direction
    from headrace.workers.train.drive_life import DriveLife

    if written := log.moved_bytes.get((Medium.ssd, Direction.store), 0):
        life = DriveLife(folders, run_config.tiers.ssd.endurance)
        life.count(written)
        for event in life.take_events():
            print(f"headrace eval: warning: {event.text}", file=sys.stderr)


def _out_folder(subject: Subject, values: Mapping[str, Any]) -> Path:
    """Where the files go; made now, so that a long evaluation does not end without a place for its result."""
    if "out" in values:
        folder = Path(values["out"]).expanduser()
    elif subject.run_dir is not None and not is_remote(str(values["run"])):
        folder = subject.run_dir / "eval"
    else:
        folder = RUNS_DIR / "eval"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MachineError(f"{folder}: cannot be made ({error.strerror}); name another folder with out=DIR") from error
    return folder.absolute()


def _write(record: Mapping[str, Any], out: Path, subject: Subject, run_config: RunConfig) -> dict[str, str]:
    """The JSON file, the picture beside it, and MLflow; returns the paths."""
    from headrace.platform.report.pictures import draw_by_position

    step = "" if subject.step is None else f"-step{subject.step}"
    name = f"{run_config.model.name}{step}-{record['seq_len']}-{time.strftime('%Y%m%d-%H%M%S')}"
    paths = {"json": out / f"{name}.json", "picture": out / f"{name}.png"}
    found = {key: str(path) for key, path in paths.items()}
    try:
        write_json(paths["json"], {**record, **found})
        draw_by_position(record["by_position"], paths["picture"])
    except OSError as error:
        raise MachineError(
            f"{out}: cannot be written ({error.strerror or error}); name another folder with out=DIR"
        ) from error
    if run_config.tracking.mlflow:
        _track(record, list(paths.values()), subject, run_config)
    return found


def _track(record: Mapping[str, Any], files: list[Path], subject: Subject, run_config: RunConfig) -> None:
    from headrace.platform.tracking.evaluation import add_alone, add_to_run, is_tracked

    text, tracking = config_text(run_config), run_config.tracking
    try:
        if subject.run_dir is not None and is_tracked(subject.run_dir):
            add_to_run(subject.run_dir, tracking, text, record, files)
        else:
            add_alone(RUNS_DIR, tracking, text, record, files)
    except Exception as error:  # whatever MLflow, its store or the network throws: the files have everything
        words = str(error) if isinstance(error, HeadraceError) else f"{type(error).__name__}: {error}".splitlines()[0]
        print(
            f"headrace eval: warning: MLflow did not take the evaluation ({words}); {files[0]} has it", file=sys.stderr
        )


def as_table(record: Mapping[str, Any]) -> str:
    """Loss and perplexity, of all tokens and by position."""

    def line(name: str, row: Mapping[str, Any]) -> str:
        loss, perplexity = ("inf" if row[key] is None else f"{row[key]:,.6g}" for key in ("loss", "perplexity"))
        return f"{name:<20} {row['tokens']:>14,} {loss:>12} {perplexity:>14}"

    chunk = "" if record["chunk_size"] is None else f" chunk_size={record['chunk_size']}"
    step = "" if record["step"] is None else f", step {record['step']}"
    lines = [
        f"{record['model']} ({record['weights']}{step}), {record['dtype']} on {record['device']}, "
        f"memory={record['memory']}{chunk}",
        f"{record['rows']} row(s) of {record['seq_len']:,} tokens of {record['data']['source']} ({record['split']}), "
        f"{record['tokens_per_s']:,.0f} tokens/s",
        "",
        f"{'position':<20} {'tokens':>14} {'loss':>12} {'perplexity':>14}",
        *(line(f"{row['begin']:,} to {row['end'] - 1:,}", row) for row in record["by_position"]),
        line("all", record),
        "",
        *(f"moved  {way}: {count:,} bytes" for way, count in record["moved_bytes"].items()),
        f"{record['json']}",
        f"{record['picture']}",
    ]
    return "\n".join(lines)
