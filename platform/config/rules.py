"""What must hold between the keys of one configuration. One small function per rule, one sentence per problem.

A sentence starts with the key and its value and ends with the remedy. Rules of heads and degrees are in
rules_parallel.py, those of memory in rules_memory.py. `RULES` hold for every verb; what only a real run needs is in
`check_trainable`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields, is_dataclass
from typing import Any

from headrace.kernels.backend import AttentionOperator, Backend
from headrace.platform.config.rules_memory import (
    budgets_within_hardware,
    chunk_size_has_its_sweep,
    codec_fits,
    eviction_has_a_drive,
    growing_memory_has_a_budget,
    pages_fit,
    presets_have_their_tier,
    records_can_be_used,
)
from headrace.platform.config.rules_parallel import (
    degrees_not_built,
    heads_divide,
    heads_split,
    pipeline_fits,
    ranks_match,
    shared_rows_fit,
)
from headrace.platform.config.schema import RunConfig
from headrace.platform.planning.hardware import DeviceClass
from headrace.storage.config import SsdEngine
from headrace.storage.core.errors import InputError
from headrace.workers.data.config import DataConfig, bucket_problem
from headrace.workers.model.config import NO_ADAPTER, PROJECTIONS
from headrace.workers.model.mixers.registry import mixer_named
from headrace.workers.model.peft_config import check_adapter_weights
from headrace.workers.model.weight_files import check_model_folder
from headrace.workers.parallel.dims import resolve_dims
from headrace.workers.train.config import Allocator, DeviceKind, Precision

Problems = Iterator[str]
Rule = Callable[[RunConfig], Problems]

# key -> smallest value that means something; null is always allowed where the type has it
AT_LEAST: dict[str, float] = {
    "model.vocab_size": 0,
    "model.hidden_size": 1,
    "model.num_layers": 1,
    "model.num_heads": 1,
    "model.num_kv_heads": 1,
    "model.intermediate_size": 1,
    "model.head_dim": 2,
    "model.sliding_window": 1,
    "model.max_position_embeddings": 1,
    "adapter.rank": 1,
    "data.seq_len": 1,
    "data.bpe_vocab_size": 257,
    "data.max_bytes": 1,
    "optim.warmup_steps": 0,
    "optim.weight_decay": 0,
    "memory.prefetch_layers": 0,
    "memory.head_groups": 1,
    "memory.sparse.page": 1,
    "memory.sparse.budget": 1,
    "memory.sparse.sink": 0,
    "memory.sparse.recent": 0,
    "memory.sparse.compare_every": 0,
    "tiers.host.budget_gib": 0,
    "tiers.ssd.budget_gib": 0,
    "tiers.ssd.num_threads": 1,
    "train.steps": 1,
    "train.batch_size": 1,
    "train.micro_batches": 1,
    "train.seed": 0,
    "train.eval_every": 0,
    "train.max_skipped_steps": 1,
    "train.loss_tile": 1,
    "train.num_threads": 1,
    "checkpoint.every": 0,
    "checkpoint.every_chunks": 0,
    "checkpoint.keep": 1,
    "parallel.data": 1,
    "parallel.fsdp": 1,
    "parallel.tensor": 1,
    "parallel.ulysses": 1,
    "parallel.ring": 1,
    "parallel.pipeline": 1,
    "parallel.pipeline_chunks": 1,
}
ABOVE_ZERO = (
    "model.rms_norm_eps",
    "model.rope_theta",
    "adapter.alpha",
    "optim.lr",
    "optim.eps",
    "tiers.device.budget_gib",
    "tiers.ssd.timeout_s",
    "tiers.ssd.endurance.rated_tbw",
    "tiers.ssd.endurance.lifetime_years",
    "train.grad_clip",
    "hardware.bf16_tflops",
    "hardware.fp32_tflops",
    "hardware.h2d_gbps",
    "hardware.d2h_gbps",
    "hardware.host_gbps",
    "hardware.ssd_write_gbps",
    "hardware.ssd_read_gbps",
    "hardware.memory_gbps",
    "hardware.node_network_gbps",
    "hardware.network_gbps",
    "hardware.compute_efficiency",
    "hardware.link_efficiency",
)
BELOW_ONE = ("optim.beta1", "optim.beta2", "data.eval_fraction", "adapter.dropout")  # 0 <= value < 1


def value_of(config: Any, key: str) -> Any:
    """The value of a dotted key."""
    for part in key.split("."):
        config = getattr(config, part)
    return config


def check_config(config: RunConfig) -> tuple[str, ...]:
    """Apply every rule.

    Returns:
        Warnings: sentences a person should read; the run continues.

    Raises:
        InputError: all problems found, one a line.
    """
    _raise([problem for rule in RULES for problem in rule(config)])
    return tuple(warning for rule in WARNINGS for warning in rule(config))


def check_trainable(config: RunConfig) -> None:
    """What `train` needs on top: degrees that are built, and the weights of `model.init_from`.

    Raises:
        InputError: a degree above 1 that only `plan` supports, a device that contradicts the hardware, or no weights.
    """
    _raise(list(degrees_not_built(config)))
    resolve_dims(config.parallel, config.cluster.num_ranks)
    if config.model.init_from is not None:
        check_model_folder(config.model.init_from)
    if config.adapter.init_from is not None:
        check_adapter_weights(config.adapter.init_from)


def _raise(problems: list[str]) -> None:
    if problems:
        raise InputError("\n".join(problems))


def finite_numbers(config: RunConfig) -> Problems:
    """No nan and no infinity anywhere."""
    yield from _not_finite(config, "")


def _not_finite(node: Any, prefix: str) -> Problems:
    for item in fields(node):
        value = getattr(node, item.name)
        if is_dataclass(value):
            yield from _not_finite(value, f"{prefix}{item.name}.")
        elif isinstance(value, float) and not math.isfinite(value):
            yield f"{prefix}{item.name}={value}: a finite number is expected"


def ranges(config: RunConfig) -> Problems:
    """Single values that have no meaning."""
    for key, least in AT_LEAST.items():
        value = value_of(config, key)
        if value is not None and value < least:
            yield f"{key}={value}: at least {least}"
    for key in ABOVE_ZERO:
        value = value_of(config, key)
        if value is not None and value <= 0:
            yield f"{key}={value}: must be above 0"
    for key in BELOW_ONE:
        value = value_of(config, key)
        if not 0 <= value < 1:
            yield f"{key}={value}: at least 0 and below 1"
    if not 0 <= config.optim.min_lr_ratio <= 1:
        yield f"optim.min_lr_ratio={config.optim.min_lr_ratio}: a share of optim.lr, from 0 to 1"
    if not 0 < config.tiers.drift_pct < 100:
        yield f"tiers.drift_pct={config.tiers.drift_pct:g}: percent below the profile's rate, above 0 and below 100"


def run_name(config: RunConfig) -> Problems:
    """The name becomes a folder."""
    name = config.run.name
    if not name or "/" in name or name.startswith(".") or len(name.encode()) > 200:
        yield (
            f"run.name={name}: it names a folder, so it is not empty, has no `/`, does not start with a dot and has at "
            "most 200 bytes"
        )


def run_folder(config: RunConfig) -> Problems:
    """A run writes its folder as it goes, which an object store does not take."""
    if "://" in (config.run.dir or ""):
        yield f"run.dir={config.run.dir}: a run cannot write to a URL (--resume can read one); name a local folder"


def adapter_has_targets(config: RunConfig) -> Problems:
    """An adapter stands on layers that there are; its settings need an adapter."""
    adapter = config.adapter
    if not adapter.is_on:
        for key, value in asdict(adapter).items():
            if value != getattr(NO_ADAPTER, key):
                yield f"adapter.{key}={value}: adapter=none trains no adapter; add adapter=lora, or leave it out"
    elif (unknown := [n for n in adapter.projections if n not in PROJECTIONS]) or not adapter.projections:
        found = f"adapter.targets={adapter.targets}: no layer {', '.join(unknown) or 'is named'}"
        yield f"{found}; write all, or some of {','.join(PROJECTIONS)}, separated by commas"


def mixers_have_names(config: RunConfig) -> Problems:
    """Every mixer is one that somebody has registered."""
    if not config.model.mixers:
        yield "model.mixers=[]: name one mixer for every layer, or one for all"
    try:
        for name in config.model.mixers:
            mixer_named(name)
    except InputError as error:
        yield str(error)


def device_matches_hardware(config: RunConfig) -> Problems:
    """The plan is made for the hardware, so the run must be on it."""
    device, hardware = config.train.device, config.hardware
    on_cuda = hardware.device_class is DeviceClass.cuda
    if device is DeviceKind.cuda and not on_cuda:
        yield f"train.device=cuda: hardware={hardware.name} is planned for; choose hardware=h200, h100_80g, ..."
    if device is DeviceKind.cpu and on_cuda:
        yield f"train.device=cpu: hardware={hardware.name} is planned for; choose hardware=cpu"


def engine_matches_hardware(config: RunConfig) -> Problems:
    """gds and ring move device memory: they need CUDA."""
    engine, hardware = config.tiers.ssd.engine, config.hardware
    if engine in (SsdEngine.gds, SsdEngine.ring) and hardware.device_class is DeviceClass.cpu:
        yield f"tiers.ssd.engine={engine.value}: needs CUDA and hardware={hardware.name} has none; use posix or auto"
    if config.tiers.ssd.required and engine is SsdEngine.auto:
        yield "tiers.ssd.required=True: tiers.ssd.engine=auto names no engine to insist on; name one"


def operators_match_run(config: RunConfig) -> Problems:
    """An operator that is named must be able to compute this run."""
    train, hardware = config.train, config.hardware
    on_cuda, name = hardware.device_class is DeviceClass.cuda, train.attention.value
    if train.kernels is Backend.stock:
        yield "train.kernels=stock: most operators have no such form; choose auto, reference or triton"
    if train.kernels is Backend.triton and not on_cuda:
        yield f"train.kernels=triton: needs CUDA and hardware={hardware.name} has none; choose auto or reference"
    if train.allocator is Allocator.planned and not on_cuda:
        yield f"train.allocator=planned: needs CUDA and hardware={hardware.name} has none; choose caching"
    if train.allocator is Allocator.planned and config.data.buckets:
        yield "train.allocator=planned: steps of data.buckets differ in length and follow no plan; choose caching"
    if train.attention in (AttentionOperator.auto, AttentionOperator.reference):
        return
    if train.attention is AttentionOperator.flash and not on_cuda:
        return
    if not on_cuda or train.precision is not Precision.bf16:
        yield f"train.attention={name}: needs train=bf16 on CUDA; choose auto or reference"
    if train.attention is AttentionOperator.cudnn and train.deterministic:
        yield "train.attention=cudnn: its backward is not deterministic; set train.deterministic=false, or choose flash"


def evaluation_has_data(config: RunConfig) -> Problems:
    """Evaluation reads rows that were held out."""
    if config.train.eval_every > 0:
        if config.train.eval_batches < 1:
            yield f"train.eval_batches={config.train.eval_batches}: at least 1, or train.eval_every=0"
        if config.data.eval_fraction == 0:
            yield f"train.eval_every={config.train.eval_every}: data.eval_fraction=0 holds no rows out; raise it"


def data_has_a_source(config: RunConfig) -> Problems:
    """An empty path is a forgotten one."""
    data: DataConfig = config.data
    for key, text in (("source", data.source), ("prepared", data.prepared), ("tokenizer", data.tokenizer)):
        if text is not None and not text.strip():
            yield f"data.{key}=: empty; name a file or folder" + ("" if key == "source" else ", or null")


def buckets_end_with_the_longest(config: RunConfig) -> Problems:
    """Lengths of rows ascend to data.seq_len."""
    if problem := bucket_problem(config.data.buckets, config.data.seq_len):
        yield problem


def profiled_steps_run(config: RunConfig) -> Problems:
    """Steps that are profiled are steps of the run."""
    steps = config.train.steps
    for step in config.train.profile:
        if not 1 <= step <= steps:
            yield f"train.profile: {step}: not a step of this run; its steps are 1 to train.steps={steps}"


def beyond_positions(config: RunConfig) -> Problems:
    """Longer than the model was made for."""
    seq_len, most = config.data.seq_len, config.model.max_position_embeddings
    if seq_len > most:
        yield f"data.seq_len={seq_len} is beyond model.max_position_embeddings={most}: rotary angles are extrapolated"


def warmup_fits(config: RunConfig) -> Problems:
    """A run that ends in its warm-up never reaches optim.lr."""
    if config.optim.warmup_steps > config.train.steps:
        yield (
            f"optim.warmup_steps={config.optim.warmup_steps} is more than train.steps={config.train.steps}: "
            "optim.lr is never reached"
        )


RULES: tuple[Rule, ...] = (
    finite_numbers,
    ranges,
    run_name,
    run_folder,
    heads_divide,
    heads_split,
    pipeline_fits,
    adapter_has_targets,
    mixers_have_names,
    ranks_match,
    budgets_within_hardware,
    growing_memory_has_a_budget,
    presets_have_their_tier,
    eviction_has_a_drive,
    device_matches_hardware,
    engine_matches_hardware,
    operators_match_run,
    evaluation_has_data,
    data_has_a_source,
    buckets_end_with_the_longest,
    chunk_size_has_its_sweep,
    shared_rows_fit,
    codec_fits,
    pages_fit,
    profiled_steps_run,
    records_can_be_used,
)
WARNINGS: tuple[Rule, ...] = (beyond_positions, warmup_fits)
