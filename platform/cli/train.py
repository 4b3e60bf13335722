"""`headrace train`: configuration, data, plan, ranks, records, in that order; the last lines say where things are."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from headrace.platform.cli.plan import ask_planner, expected_vocab_size, ssd_folders
from headrace.platform.cli.plan_pipeline import plan_pipeline
from headrace.platform.cli.remote_run import local_run
from headrace.platform.config.load import CONFIG_FILE, LoadedConfig, config_text, load_run_config, load_saved_config
from headrace.platform.config.rules import check_trainable
from headrace.platform.config.schema import RunConfig
from headrace.platform.control.job import make_job, resolve
from headrace.platform.control.reach import check_cluster
from headrace.platform.planning.answer import resumed
from headrace.platform.planning.drive_wear import without_spent_drive
from headrace.platform.planning.lengths import explain_plans, plan_record, slab_bytes, solve_plans
from headrace.platform.planning.request import PlanRequest
from headrace.platform.planning.steer import Steering
from headrace.platform.tracking.run_folder import PLAN_FILE, SUMMARY_FILE, read_json
from headrace.platform.tracking.run_owner import check_unused, own_run_folder
from headrace.platform.tracking.trackers import check_packages
from headrace.storage.core.cleanup import after_error
from headrace.storage.core.errors import ErrorId, InputError, MachineError
from headrace.storage.core.records import Medium
from headrace.workers.data.bucket_index import BucketIndex, index_of
from headrace.workers.data.prepare import prepare
from headrace.workers.data.prepared import PreparedData
from headrace.workers.data.progress import progress_bar
from headrace.workers.job import TrainJob
from headrace.workers.memory.plan import MemoryPlan
from headrace.workers.model.adapter import num_adapter_params, num_params
from headrace.workers.model.init_tokenizer import data_for_model
from headrace.workers.parallel.dims import resolve_dims
from headrace.workers.train.checkpoint_folder import CheckpointFolder
from headrace.workers.train.config import DeviceKind

RUNS_DIR = Path("runs")
USAGE = """usage: headrace train [--resume RUN [--start-over]] [--dry-run] [--json] [conf=EXPERIMENT|FILE.yaml]
                      [GROUP=CHOICE ...] [key=value ...]

  conf=FILE.yaml a recipe of your own, written like the files of conf/experiment
  --resume RUN   continue a run folder, or a copy of the one at a URL such as s3://bucket/runs/NAME
                 (its config.yaml; key=value may change single keys)
  --start-over   with --resume: start at step 0 if every checkpoint is damaged; the damaged ones are kept
  --dry-run      print the resolved configuration and the plan, and stop
  --json         print one JSON object as the last line
"""


@dataclass(frozen=True)
class Options:
    """The command line, split: flags, and words for the configuration."""

    words: tuple[str, ...]
    resume: str | None = None
    start_over: bool = False
    dry_run: bool = False
    json: bool = False


def run(argv: Sequence[str]) -> int:
    """Train, or with --dry-run say what would be done.

    Returns:
        0 done, 1 the run failed, 3 stopped by a signal after a checkpoint.

    Raises:
        InputError: a bad word, configuration, data or run folder (exit 2). MachineError: this machine cannot, or a
            tracker is not installed (exit 2).
    """
    options = parse_options(argv)
    options = replace(options, resume=local_run(options.resume, options.words, RUNS_DIR))
    loaded = load(options)
    for warning in loaded.warnings:
        print(f"headrace train: warning: {warning}", file=sys.stderr)
    config = loaded.config
    check_trainable(config)
    check_packages(config.tracking)
    if options.resume is None:
        config = replace(config, data=data_for_model(config.data, config.model.init_from))
    if options.dry_run:
        return show(config, choose_run_dir(config, options.resume), as_json=options.json)
    with own_run_dir(config, options.resume) as run_dir:
        return prepare_and_train(replace(loaded, config=config), run_dir, options)


def prepare_and_train(loaded: LoadedConfig, run_dir: Path, options: Options) -> int:
    """What the run needs, in order: cluster, data, plan; then the ranks. Returns the exit code; raises as `run`."""
    config = loaded.config
    check_cluster(config.cluster, DeviceKind(config.hardware.device_class.value))
    try:
        data = prepare_data(config)
    except KeyboardInterrupt:
        print(
            "headrace train: interrupted while preparing data; run the same command again to continue", file=sys.stderr
        )
        return 1
    config = resolve(config, data)
    request = ask_planner(config, run_dir, config.model.vocab_size)
    before = read_json(run_dir / PLAN_FILE)
    if options.resume is not None and (run_dir / PLAN_FILE).exists():
        request, warning = resumed(request, before, partial(has_plans, config))
        if warning:
            print(f"headrace train: warning: {warning}", file=sys.stderr)
    is_pipeline = config.parallel.pipeline > 1
    if not is_pipeline:
        request, warning = without_spent_drive(request, config.tiers.ssd.endurance, ssd_folders(config, run_dir))
        if warning:
            print(f"headrace train: warning: {warning}", file=sys.stderr)
    planned = plan_run(config, request)
    print(planned.text, end="\n\n", flush=True)
    plans, slabs = planned.plans, planned.slabs
    job = make_job(config, plans, run_dir, resume=options.resume is not None)
    steering = Steering(
        *(request, plans, slabs),
        shares=length_shares(config, data),
        num_ranks=config.cluster.num_ranks,
        num_steps=config.train.steps,
        record=before,
        checks=not is_pipeline,
    )
    job = replace(job, start_over=options.start_over, num_replans=steering.number)
    facts = start_facts(config, request, data) | {"changed": all_changes(loaded, run_dir)}
    return train(config, job, slabs, Records(steering, facts), options)


@dataclass(frozen=True)
class Planned:
    """The plans of all blocks by the length of rows, the slabs of one node by tier, and what people read of them."""

    plans: Mapping[int, MemoryPlan]
    slabs: Mapping[Medium, int]
    text: str


def has_plans(config: RunConfig, request: PlanRequest) -> bool:
    """Whether a run has plans for a request."""
    try:
        plan_run(config, request)
    except InputError:
        return False
    return True


def plan_run(config: RunConfig, request: PlanRequest) -> Planned:
    """Solve what a run needs. Raises InputError as solve_plans."""
    if config.parallel.pipeline > 1:
        found = plan_pipeline(config, request)
        return Planned({request.seq_len: found.whole}, found.slab_bytes, found.explain())
    plans = solve_plans(request)
    text = explain_plans(plans, request, endurance=config.tiers.ssd.endurance)
    return Planned(plans, slab_bytes(plans, request), text)


def parse_options(argv: Sequence[str]) -> Options:
    """Flags out of the words.

    Raises:
        InputError: --resume without a folder, --start-over without --resume.
    """
    words, resume, flags = [], None, set()
    rest = iter(argv)
    for word in rest:
        name, equals, value = word.partition("=")
        if name == "--resume":
            resume = value if equals else next(rest, "")
            if not resume:
                raise InputError("--resume: the run folder is missing, for example --resume runs/NAME")
        elif word in ("--start-over", "--dry-run", "--json"):
            flags.add(word)
        else:
            words.append(word)
    if "--start-over" in flags and resume is None:
        raise InputError("--start-over: belongs to --resume RUN, whose checkpoints are all damaged")
    return Options(tuple(words), resume, "--start-over" in flags, "--dry-run" in flags, "--json" in flags)


def load(options: Options) -> LoadedConfig:
    """The configuration of a new run, or that of the folder to continue.

    Raises:
        InputError: a bad word, or a folder that is no run folder.
    """
    if options.resume is None:
        return load_run_config(options.words)
    return load_saved_config(resumed_folder(options.resume) / CONFIG_FILE, options.words)


def resumed_folder(text: str) -> Path:
    """A run folder by its path, or by its name below runs/.

    Raises:
        InputError: there is none.
    """
    for folder in (Path(text).expanduser(), RUNS_DIR / text):
        if (folder / CONFIG_FILE).is_file():
            return folder.absolute()
    there = ", ".join(sorted(path.parent.name for path in RUNS_DIR.glob(f"*/{CONFIG_FILE}"))[-5:])
    raise InputError(
        f"--resume {text}: no run folder (no {CONFIG_FILE} in it)" + (f"; runs/ has: {there}" if there else "")
    )


def choose_run_dir(config: RunConfig, resume: str | None) -> Path:
    """Absolute path of the run folder; a new run gets one that is empty or not there.

    Raises:
        InputError: run.dir is used already, or is no place for a folder.
    """
    if resume is not None:
        return resumed_folder(resume)
    if config.run.dir is None:
        name = f"{config.run.name}-{datetime.now().strftime('%Y%m%d-%H%M%S')}"
        folders = (RUNS_DIR / (name if i == 0 else f"{name}-{i}") for i in range(1000))
        return next(folder for folder in folders if not folder.exists()).absolute()
    try:
        folder = Path(config.run.dir).expanduser().absolute()
    except RuntimeError as error:  # ~somebody
        raise InputError(f"run.dir={config.run.dir}: {error}", id=ErrorId.run_folder_unusable) from None
    check_unused(folder)
    return folder


@contextmanager
def own_run_dir(config: RunConfig, resume: str | None) -> Iterator[Path]:
    """The run folder, for this process alone.

    Raises:
        InputError: another process writes there, it is used already, or it cannot be written.
    """
    with ExitStack() as closing:
        while True:
            run_dir = choose_run_dir(config, resume)
            try:
                closing.enter_context(own_run_folder(run_dir, new=resume is None))
                break
            except InputError as error:
                taken = error.id in (ErrorId.run_folder_in_use, ErrorId.run_folder_used)
                if not taken or resume is not None or config.run.dir is not None:
                    raise  # a name of our own choice that another run took in the same second: the next one
        yield run_dir


def prepare_data(config: RunConfig) -> PreparedData:
    """The run's token rows, made now where they are not there yet.

    Raises:
        InputError: bad source or tokenizer, with file and line. MachineError: no room on the disk.
    """
    with progress_bar() as progress:
        return prepare(config.data, progress=progress)


def show(config: RunConfig, run_dir: Path, *, as_json: bool) -> int:
    """Print what a run would do. No data is prepared: an open vocabulary counts as large as its tokenizer will be."""
    vocab_size = config.model.vocab_size or expected_vocab_size(config.data)
    request = ask_planner(config, run_dir, vocab_size)
    planned = plan_run(config, request)
    plans = planned.plans
    print(config_text(config))
    print(planned.text)
    print(f"\nrun folder: {run_dir} (not made: --dry-run)")
    if as_json:
        shares = dict.fromkeys(plans, 1 / len(plans))  # no data is prepared that could tell them
        print(
            json.dumps({"run_dir": str(run_dir), "plan": plan_record(plans, request, shares), "vocab_size": vocab_size})
        )
    return 0


@dataclass(frozen=True)
class Records:
    """What the run folder says: the plan, which may change, and facts from before the first step."""

    steering: Steering
    facts: Mapping[str, Any]


def length_shares(config: RunConfig, data: PreparedData) -> dict[int, float]:
    """Of every length of the rows, its share of the run's micro-batches."""
    dims = resolve_dims(config.parallel, config.cluster.num_ranks)
    index = index_of(data, config.data, config.train, dims.data)
    if not isinstance(index, BucketIndex):
        return {data.seq_len: 1.0}
    return dict(zip(data.lengths, index.shares(), strict=True))


def train(config: RunConfig, job: TrainJob, slabs: Mapping[Medium, int], records: Records, options: Options) -> int:
    """Run the ranks and keep the records, however it ends.

    Args:
        slabs: bytes per node of each tier.

    Returns:
        The exit code.
    """
    from headrace.platform.control.launch import launch
    from headrace.platform.control.states import Outcome
    from headrace.platform.tracking.recorder import RunRecorder

    recorder = RunRecorder(
        job.run_dir, config.tracking, num_ranks=config.cluster.num_ranks, num_steps=config.train.steps
    )
    try:
        recorder.start(config_text(config), records.steering.record, records.facts)
    except OSError as error:
        raise MachineError(
            f"{job.run_dir}: the run folder cannot be written ({error.strerror or error}); make room, or name another "
            "folder with run.dir=DIR",
            id=ErrorId.run_folder_unusable,
        ) from error
    try:
        outcome = launch(
            job,
            config.cluster,
            recorder,
            host_bytes=slabs[Medium.host],
            ssd_bytes=slabs[Medium.ssd],
            ssd_folders=ssd_folders(config, Path(job.run_dir)),
            steering=records.steering,
        )
    except BaseException as error:
        ended = Outcome.stopped if isinstance(error, KeyboardInterrupt) else Outcome.failed
        facts = {"error": f"{type(error).__name__}: {error}"}
        after_error(error, lambda: print(recorder.finish(ended, facts), file=sys.stderr))
        after_error(error, lambda: print(how_to_go_on(Path(job.run_dir)), file=sys.stderr))
        raise
    ended_facts = {**outcome.facts, "restarts": outcome.restarts, "error": outcome.failure}
    print(recorder.finish(outcome.outcome, ended_facts), flush=True)
    if outcome.outcome is not Outcome.finished:
        print(how_to_go_on(Path(job.run_dir)), file=sys.stderr)
    if outcome.failure is not None:
        print(f"headrace train: {outcome.failure}", file=sys.stderr)
    if options.json:
        ends = {"outcome": outcome.outcome.value, "exit_code": outcome.exit_code, "restarts": outcome.restarts}
        print(json.dumps({"run_dir": job.run_dir, **ends}))
    return outcome.exit_code


def how_to_go_on(run_dir: Path) -> str:
    """The command that resumes a run which has not finished, from its newest checkpoint."""
    steps = CheckpointFolder(run_dir / "checkpoints").committed_steps()
    folder = run_dir.relative_to(Path.cwd()) if run_dir.is_relative_to(Path.cwd()) else run_dir
    since = f"after step {steps[0]}" if steps else "from the first step: no checkpoint was saved"
    return f"  go on       headrace train --resume {shlex.quote(str(folder))}   ({since})"


def start_facts(config: RunConfig, request: PlanRequest, data: PreparedData) -> dict[str, Any]:
    """What the run's record should know before the first step."""
    return {
        "model": config.model.name,
        "num_params": num_params(config.model),
        "num_trained_params": num_adapter_params(config.model, config.adapter) or num_params(config.model),
        "data": {"folder": data.where, "digest": data.digest, "num_rows": data.num_rows, "source": data.source}
        | ({"buckets": [vars(bucket) for bucket in data.buckets]} if data.buckets else {}),
        "hardware": {key: getattr(value, "value", value) for key, value in asdict(request.profile).items()},
        "rates": request.rates_note or request.profile.evidence.value,
        "num_ranks": config.cluster.num_ranks,
    }


def all_changes(loaded: LoadedConfig, run_dir: Path) -> dict[str, Any]:
    """What differs from the experiment that the run began with: key -> (the experiment's value, this run's)."""
    before = (read_json(run_dir / SUMMARY_FILE).get("facts") or {}).get("changed") or {}
    return {**before, **{key: (before.get(key, (was,))[0], now) for key, (was, now) in loaded.changed.items()}}
