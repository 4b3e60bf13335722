"""The headline rows on one GPU: headrace beside transformers, same shapes, same rows of text, same run.

Qwen2.5-0.5B and Qwen2.5-7B shapes (random weights) at 16K and 32K tokens, one sequence a step. transformers is run as
its users run it: SDPA attention, gradient checkpointing per layer, with and without its own host offload, its own loss.
Its weights, gradients and moments are fp32 as ours are; a second set with bf16 weights (half of the state, no master
copy) is what fits where fp32 does not, and is named so.
"""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from headrace.platform.bench.gpu_case import Case, System, Weights
from headrace.platform.bench.harness import OptionValue, Row, Target
from headrace.platform.bench.model_shapes import model_shape
from headrace.platform.paths import CONF_DIR
from headrace.storage.core.errors import InputError, MachineError
from headrace.workers.data.config import DataConfig, SourceFormat
from headrace.workers.data.prepare import prepare

DESCRIPTION = "tokens/s, MFU and peak memory of one GPU, beside transformers with checkpointing and host offload"
OPTIONS: Mapping[str, OptionValue] = {
    "models": "qwen2_5_0_5b,qwen2_5_7b",
    "lengths": "16384,32768",
    "systems": "headrace_recompute,headrace_offload_host,transformers_checkpoint,transformers_offload",
    "bf16_weights": True,
    "steps": 4,
    "device": "cuda",
    "hardware": "h200",
    "limit_s": 500,
    "case_limit_s": 120,
}
# Enough for the rows of the longest run at four characters a token, and prepared in seconds.
MAX_SOURCE_BYTES = 12_000_000


def run(options: Mapping[str, OptionValue]) -> Iterator[Row]:
    """Measure every case in a process of its own, the fewest bytes first; a case that fails is a row with its reason.

    Raises:
        MachineError: there is no CUDA device. InputError: an unknown system or model, a length that is not a number.
    """
    device = str(options["device"])
    if device == "cuda":
        _require_cuda()
    end_s = time.monotonic() + float(options["limit_s"])
    done: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="headrace-headline-") as folder:
        prepared: dict[int, str] = {}
        for case in cases(options):
            if case.seq_len not in prepared:
                prepared[case.seq_len] = one_document_rows(Path(folder), case.seq_len)
            left_s = min(float(options["case_limit_s"]), end_s - time.monotonic())
            row = measure(Case(**{**vars(case), "prepared": prepared[case.seq_len]}), left_s)
            done.append(row)
            yield row
    yield from ratios(done)


def cases(options: Mapping[str, OptionValue]) -> list[Case]:
    """What to measure, in the order of measuring; `prepared` is still empty.

    Raises:
        InputError: see run.
    """
    try:
        systems = [System(word) for word in _words(options["systems"])]
        lengths = [int(word) for word in _words(options["lengths"])]
    except ValueError as error:
        known = ", ".join(system.value for system in System)
        raise InputError(f"systems or lengths: {error}; systems are {known}, lengths whole numbers") from None
    models = _words(options["models"])
    for model in models:
        model_shape(model)
    device = str(options["device"])
    peak_flops = datasheet_flops(str(options["hardware"])) if device == "cuda" else 0.0
    runs = [(system, Weights.fp32) for system in systems]
    if options["bf16_weights"]:
        runs += [(system, Weights.bf16) for system in systems if not system.is_ours]
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


def one_document_rows(folder: Path, seq_len: int) -> str:
    """Token rows of real text in which every row is one document, so that attention is causal over all of it.

    The source text of the standard library, joined into one file.
    """
    source = folder / "library.txt"
    if not source.exists():
        left = MAX_SOURCE_BYTES
        with source.open("w") as joined:
            for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
                if "site-packages" in path.parts or left <= 0:
                    continue
                text = path.read_text(errors="ignore")[:left]
                joined.write(text)
                left -= len(text)
    config = DataConfig(
        name="headline",
        source=str(source),
        format=SourceFormat.text,
        seq_len=seq_len,
        cache_dir=str(folder / "cache"),
        eval_fraction=0.0,
    )
    return str(prepare(config).folder)


def measure(case: Case, limit_s: float) -> Row:
    """One case in a child process of at most `limit_s` seconds."""
    name = f"{case.model}/{case.seq_len}/{case.system.value}/{case.weights.value}_weights"
    config = {key: value for key, value in json.loads(case.to_json()).items() if key != "prepared"}
    if limit_s <= 5.0:
        return Row(name, config=config, error="not started: the time of the whole benchmark (limit_s) is used up")
    command = [sys.executable, "-m", "headrace.platform.bench.gpu_case", case.to_json()]
    begin_s = time.monotonic()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s, check=False)
    except subprocess.TimeoutExpired:
        return Row(name, config=config, error=f"stopped after {limit_s:.0f} s")
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if not lines:
        return Row(name, config=config, error=f"exit code {done.returncode}: {done.stderr[-500:]}")
    answer: dict[str, Any] = json.loads(lines[-1])
    status, error = answer.pop("status"), answer.pop("error", None)
    numbers = {key: value for key, value in answer.items() if isinstance(value, int | float)}
    facts = {key: value for key, value in answer.items() if key not in numbers}
    numbers["case_s"] = round(time.monotonic() - begin_s, 1)
    return Row(name, numbers, {**config, **facts}, error=None if status == "ok" else f"{status}: {error}")


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
