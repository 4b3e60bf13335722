"""The headline rows on one GPU: headrace beside transformers, same shapes, same rows of text, same run.

Qwen2.5-0.5B and Qwen2.5-7B shapes (random weights) at 16K and 32K tokens, one sequence a step. transformers is run as
its users run it: SDPA attention, gradient checkpointing per layer, with and without its own host offload, its own loss.
Its weights, gradients and moments are fp32 as ours are; a second set with bf16 weights (half of the state, no master
copy) is what fits where fp32 does not, and is named so.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import statistics
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from headrace.bench.gpu_case import Case, System, Weights
from headrace.bench.harness import OptionValue, Row, Target
from headrace.bench.model_shapes import model_shape
from headrace.platform.children import Child
from headrace.platform.paths import CONF_DIR
from headrace.storage.core.errors import InputError, MachineError
from headrace.workers.data.config import DataConfig, SourceFormat
from headrace.workers.data.opening import open_prepared
from headrace.workers.data.prepare import prepare_into

CASE = "headrace.bench.gpu_case"
DESCRIPTION = "tokens/s, MFU and peak memory of one GPU, compared with transformers with checkpointing and host offload"
OPTIONS: Mapping[str, OptionValue] = {
    # What matters most comes first: the time may run out.
    "models": "qwen2_5_7b,qwen2_5_0_5b",
    "lengths": "32768,16384",
    "systems": "headrace_offload_host,transformers_checkpoint,transformers_offload,headrace_recompute",
    # Of transformers; ours are fp32.
    "weights": "fp32,bf16",
    # Folder of prepared rows, by length; what is missing is made there. Empty: a temporary one.
    "rows": "",
    "steps": 4,
    "device": "cuda",
    "hardware": "h200",
    "limit_s": 500,
    "case_limit_s": 120,
}
# Python source has some four bytes a token.
BYTES_PER_TOKEN = 5


def run(options: Mapping[str, OptionValue]) -> Iterator[Row]:
    """Measure every case in a process of its own; a row per step, then one for the case, with its reason if it failed.

    Raises:
        MachineError: there is no CUDA device. InputError: an unknown system or model, a length that is not a number.
    """
    device = str(options["device"])
    if device == "cuda":
        _require_cuda()
    end_s = time.monotonic() + float(options["limit_s"])
    done: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="headrace-headline-") as folder:
        rows = Path(str(options["rows"]) or folder)
        for case in cases(options):
            prepared = one_document_rows(rows, case.seq_len, case.warmup + case.steps)
            left_s = min(float(options["case_limit_s"]), end_s - time.monotonic())
            for row in measure(replace(case, prepared=prepared), left_s):
                yield row
            done.append(row)
    yield from ratios(done)


def cases(options: Mapping[str, OptionValue]) -> list[Case]:
    """What to measure, in the order of measuring; `prepared` is still empty.

    Raises:
        InputError: see run.
    """
    try:
        systems = [System(word) for word in _words(options["systems"])]
        weights = [Weights(word) for word in _words(options["weights"])]
        lengths = [int(word) for word in _words(options["lengths"])]
    except ValueError as error:
        known = ", ".join(system.value for system in System)
        raise InputError(f"{error}; systems are {known}, weights fp32 or bf16, lengths whole numbers") from None
    models = _words(options["models"])
    for model in models:
        model_shape(model)
    device = str(options["device"])
    peak_flops = datasheet_flops(str(options["hardware"])) if device == "cuda" else 0.0
    runs = [(system, kind) for kind in weights for system in systems if kind is Weights.fp32 or not system.is_ours]
    steps = int(options["steps"])
    return [
        Case(system, model, seq_len, "", weights, steps, device=device, peak_flops=peak_flops)
        for model in models
        for seq_len in lengths
        for system, weights in runs
    ]


def datasheet_flops(hardware: str) -> float:
    """Dense bf16 FLOP/s of conf/hardware/NAME.yaml: what MFU is a share of.

    Raises:
        InputError: no such profile, or one without the rate.
    """
    path = CONF_DIR / "hardware" / f"{hardware}.yaml"
    tflops = yaml.safe_load(path.read_text()).get("bf16_tflops") if path.is_file() else None
    if not tflops:
        raise InputError(f"hardware={hardware}: no conf/hardware/{hardware}.yaml with bf16_tflops; MFU needs the peak")
    return float(tflops) * 1e12


def one_document_rows(folder: Path, seq_len: int, num_rows: int) -> str:
    """Token rows of real text in which every row is one document, so that attention is causal over all of it.

    The source text of the standard library, joined into one file. Rows that are in `folder` already are taken.

    Returns:
        The folder of the rows of this length.
    """
    place = folder / str(seq_len)
    with contextlib.suppress(InputError):  # not there, or of an older schema
        return str(open_prepared(str(place), seq_len=seq_len).folder)
    shutil.rmtree(place, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    source, left = folder / f"library-{seq_len}.txt", num_rows * seq_len * BYTES_PER_TOKEN
    with source.open("w") as joined:
        for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
            if "site-packages" in path.parts or left <= 0:
                continue
            text = path.read_text(errors="ignore")[:left]
            joined.write(text)
            left -= len(text)
    config = DataConfig(
        name="headline", source=str(source), format=SourceFormat.text, seq_len=seq_len, eval_fraction=0.0
    )
    return str(prepare_into(config, place).folder)


def measure(case: Case, limit_s: float) -> Iterator[Row]:
    """One case in a child process of at most `limit_s` seconds: a row per step as it is done, then that of the case."""
    name = f"{case.model}/{case.seq_len}/{case.system.value}/{case.weights.value}_weights"
    config = {key: value for key, value in json.loads(case.to_json()).items() if key != "prepared"}
    if limit_s <= 5.0:
        yield Row(name, config=config, error="not started: the time limit of the whole benchmark (limit_s) has passed")
        return
    steps: list[dict[str, Any]] = []
    answer: dict[str, Any] = {}
    with Child([sys.executable, "-m", CASE, case.to_json()], limit_s=limit_s) as child:
        for row in child.rows():
            if "status" in row:
                answer = row
            else:
                steps.append(row)
                yield Row(f"{name}/step{row['step']}", {"step_s": row["step_s"], "loss": row["loss"]})
    case_s = round(time.monotonic() - child.begin_s, 1)
    status = answer.pop("status", child.failure)
    error = None if status == "ok" else f"{status}: {answer.pop('error')}" if "error" in answer else status
    if not answer and (timed := [row["step_s"] for row in steps[case.warmup :]]):  # it was stopped in its last steps
        step_s = statistics.median(timed)
        answer = {"step_s": step_s, "tokens_per_s": case.seq_len / step_s}
    numbers = {key: value for key, value in answer.items() if isinstance(value, int | float)}
    facts = {key: value for key, value in answer.items() if key not in numbers}
    yield Row(name, {**numbers, "case_s": case_s}, {**config, **facts}, error=error)


def ratios(rows: list[Row]) -> Iterator[Row]:
    """Our best against the best of transformers with weights of the same kind, per shape and length."""
    shapes = list(dict.fromkeys((row.config["model"], row.config["seq_len"]) for row in rows))
    for model, seq_len in shapes:
        mine = [r for r in rows if (r.config["model"], r.config["seq_len"]) == (model, seq_len) and r.error is None]
        ours = [r for r in mine if System(r.config["system"]).is_ours]
        theirs = [r for r in mine if not System(r.config["system"]).is_ours and r.config["weights"] == "fp32"]
        lighter = [r for r in mine if not System(r.config["system"]).is_ours and r.config["weights"] == "bf16"]
        for label, peers in (("fp32_weights", theirs), ("bf16_weights", lighter)):
            if not (ours and peers):
                continue
            best, peer = (max(group, key=lambda row: row.numbers["tokens_per_s"] or 0.0) for group in (ours, peers))
            ratio = float(best.numbers["tokens_per_s"] or 0.0) / float(peer.numbers["tokens_per_s"] or 1.0)
            target = Target("faster than transformers with the same kind of weights", ratio > 1.0)
            yield Row(
                f"{model}/{seq_len}/speed_over_transformers_{label}",
                {"tokens_per_s_ratio": ratio},
                {"ours": best.name, "theirs": peer.name},
                target if label == "fp32_weights" else None,
            )


def _words(value: OptionValue) -> list[str]:
    return [word for word in str(value).split(",") if word]


def _require_cuda() -> None:
    import torch

    if not torch.cuda.is_available():
        raise MachineError("gpu-headline measures a CUDA device and there is none; device=cpu tries the cases on CPU")
