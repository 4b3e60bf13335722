"""The whole comparison: run transformers and headrace on the same folder and tokens, judge the errors."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any

import torch

from headrace.storage.core.errors import InputError, MachineError
from headrace.workers.memory.config import KvPlace
from headrace.workers.model.config import ModelConfig
from headrace.workers.model.hf import load_config
from headrace.workers.model.tensor_cut import degree_problems
from headrace.workers.parallel.pipeline.actions import default_chunks
from headrace.workers.parallel.row_cut import key_heads_problem
from headrace.workers.verify.batches import random_batches
from headrace.workers.verify.compare import (
    GradientErrors,
    bit_equal,
    block_errors,
    block_of,
    gradient_errors,
    largest,
    medians,
    ratio,
    relative,
)
from headrace.workers.verify.config import DEGREES, VerifyConfig, VerifyDevice, VerifyDtype, check_config
from headrace.workers.verify.oracle import Oracle, oracle_steps
from headrace.workers.verify.ours import OurRun, our_steps
from headrace.workers.verify.ranks import other_ranks
from headrace.workers.verify.steps import StepGradients, full_fp32

# DESIGN section 8 and NUMERICS.md section 2. A bound that fails is never raised: find the cast that differs.
BOUNDS = {VerifyDtype.fp64: 1e-11, VerifyDtype.fp32: 5e-5}
BF16_WHOLE_RATIO, BF16_PARAM_RATIO, BF16_SEEDS = 1.2, 1.5, 5
BF16_LOSS = 2.0**-8
_DTYPES = {VerifyDtype.fp64: torch.float64, VerifyDtype.fp32: torch.float32, VerifyDtype.bf16: torch.bfloat16}
_SHAPE = ("seq_len", "batch", "micro_batches", "documents", "responses", "steps", "seed")
_ORACLES = {VerifyDtype.fp64: Oracle.fp64, VerifyDtype.fp32: Oracle.fp32}


@dataclass(frozen=True)
class Bf16Errors:
    """What bf16 adds: transformers' own bf16 error against the same fp64 oracle, medians of the seeds.

    Args:
        whole, whole_transformers: of the whole concatenated gradient.
        params_transformers: by parameter name, as VerifyResult.params.
        param_ratios: median over seeds of our error over theirs on the same tokens (paired: how hard a seed is cancels
            out); for a parameter without a true gradient, over that of its block.
    """

    whole: float
    whole_transformers: float
    params_transformers: dict[str, float]
    param_ratios: dict[str, float]

    @property
    def whole_ratio(self) -> float:
        """Our error of the whole gradient over transformers'."""
        return ratio(self.whole, self.whole_transformers)


@dataclass(frozen=True)
class VerifyResult:
    """What `headrace verify` reports.

    Args:
        loss, loss_transformers: of the first step (bf16: of the first seed, the second from the fp64 oracle).
        loss_rel_error: largest over steps (bf16: median over seeds).
        params: relative error by Hugging Face name, largest over steps (bf16: median over seeds).
        noise_params: parameters without a true gradient; their error is relative to their block's gradient.
        bit_equal_to_keep: loss and every gradient, with the plan that keeps everything (VerifyConfig.kept); None where
            memory is that plan.
        moved_bytes: by direction and tier, for example {"store/host": 4096}.
    """

    config: VerifyConfig
    device: str
    loss: float
    loss_transformers: float
    loss_rel_error: float
    params: dict[str, float]
    noise_params: tuple[str, ...]
    bit_equal_to_keep: bool | None
    moved_bytes: dict[str, int] = field(default_factory=dict)
    bf16: Bf16Errors | None = None

    @property
    def max_rel_error(self) -> float:
        """The largest error of a parameter."""
        return largest(self.params)[1]

    def failures(self) -> list[str]:
        """Every bound that does not hold, in words; empty where all do. A lossy plan has none but its own bits."""
        failed = []
        if self.bit_equal_to_keep is False:
            memory, kept = self.config.memory.value, self.config.kept_words
            failed.append(f"memory={memory}: loss or gradients differ from {kept} in some bit")
        if self.config.is_lossy:
            return failed
        if self.bf16 is not None:
            return failed + self._bf16_failures(self.bf16)
        bound = BOUNDS[self.config.dtype]
        if not self.loss_rel_error <= bound:
            failed.append(f"loss: relative error {self.loss_rel_error:.2e} is above {bound:g}")
        failed += [
            f"{name}: relative error {error:.2e} is above {bound:g}"
            for name, error in self.params.items()
            if not error <= bound
        ]
        return failed

    def _bf16_failures(self, bf16: Bf16Errors) -> list[str]:
        failed = []
        if not self.loss_rel_error <= BF16_LOSS:
            failed.append(f"loss: relative error {self.loss_rel_error:.2e} is above {BF16_LOSS:g}")
        if not bf16.whole_ratio <= BF16_WHOLE_RATIO:
            failed.append(f"whole gradient: error is {bf16.whole_ratio:.2f} x transformers', above {BF16_WHOLE_RATIO}")
        return failed + [
            f"{name}: error is {value:.2f} x transformers', above {BF16_PARAM_RATIO}"
            for name, value in bf16.param_ratios.items()
            if not value <= BF16_PARAM_RATIO
        ]

    def to_json(self) -> dict[str, Any]:
        """Plain values under stable names; every number is finite."""
        import transformers

        config = self.config
        name, error = largest(self.params)
        values: dict[str, Any] = {
            "passed": not self.failures(),
            "hf": config.hf,
            "dtype": config.dtype.value,
            "device": self.device,
            **{key: getattr(config, key) for key in _SHAPE},
            "ranks": config.num_ranks,
            "parallel": {name: getattr(config, name) for name in DEGREES},
            "memory": config.memory.value,
            "lossy": config.is_lossy,
            "loss": self.loss,
            "loss_transformers": self.loss_transformers,
            "loss_rel_error": self.loss_rel_error,
            "max_rel_error": error,
            "max_rel_error_param": name,
            "bit_equal_to_keep": self.bit_equal_to_keep,
            "moved_bytes": self.moved_bytes,
            "noise_params": list(self.noise_params),
            "failures": self.failures(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
        if self.bf16 is None:
            values["bound"] = None if config.is_lossy else BOUNDS[config.dtype]
        else:
            values["num_seeds"] = BF16_SEEDS
            values["whole_rel_error"] = self.bf16.whole
            values["whole_rel_error_transformers"] = self.bf16.whole_transformers
            values["whole_ratio"], values["whole_ratio_bound"] = self.bf16.whole_ratio, BF16_WHOLE_RATIO
            values["max_param_ratio_param"], values["max_param_ratio"] = largest(self.bf16.param_ratios)
            values["param_ratio_bound"] = BF16_PARAM_RATIO
            values["params_transformers"] = self.bf16.params_transformers
        values["params"] = self.params
        return values


def verify(config: VerifyConfig) -> VerifyResult:
    """Compare headrace with transformers on one folder.

    Raises:
        InputError: the folder or a setting cannot be used.
        MachineError: transformers is missing, cuda is asked for and not there, or no room for a tier.
    """
    check_config(config)
    device = device_of(config)
    model_config = load_config(config.hf)
    _check_length(config, model_config.max_position_embeddings)
    _check_heads(config, model_config)
    with full_fp32(), other_ranks(config, device):
        if config.dtype is VerifyDtype.bf16:
            return _verify_bf16(config, model_config.vocab_size, device)
        return _verify_exact(config, model_config.vocab_size, device)


def our_side(config: VerifyConfig, device: torch.device) -> None:
    """What a rank that is not the first one does: all of our runs, in the order in which the first one makes them."""
    vocab_size = load_config(config.hf).vocab_size
    with full_fp32():
        for seed in range(config.seed, config.seed + (BF16_SEEDS if config.dtype is VerifyDtype.bf16 else 1)):
            _our_runs(config, random_batches(config, vocab_size, seed), device)


def _verify_exact(config: VerifyConfig, vocab_size: int, device: torch.device) -> VerifyResult:
    steps = random_batches(config, vocab_size, config.seed)
    mine, is_bit_equal = _our_runs(config, steps, device)
    theirs = oracle_steps(config.hf, _ORACLES[config.dtype], steps, config.lr, device)
    errors = [gradient_errors(m.grads, t.grads) for m, t in zip(mine.steps, theirs, strict=True)]
    return VerifyResult(
        config=config,
        device=str(device),
        loss=mine.steps[0].loss,
        loss_transformers=theirs[0].loss,
        loss_rel_error=max(relative(m.loss, t.loss) for m, t in zip(mine.steps, theirs, strict=True)),
        params={name: max(e.params[name] for e in errors) for name in errors[0].params},
        noise_params=_noise(errors),
        bit_equal_to_keep=is_bit_equal,
        moved_bytes=mine.moved_bytes,
    )


@dataclass(frozen=True)
class _SeedErrors:
    """One seed of a bf16 comparison; all errors against the fp64 oracle."""

    run: OurRun
    is_bit_equal: bool | None
    loss_oracle: float
    mine: GradientErrors
    theirs: GradientErrors
    param_ratios: dict[str, float]


def _verify_bf16(config: VerifyConfig, vocab_size: int, device: torch.device) -> VerifyResult:
    seeds = [_one_seed(config, vocab_size, config.seed + i, device) for i in range(BF16_SEEDS)]
    params = medians(s.mine.params for s in seeds)
    whole = medians({"mine": s.mine.whole, "theirs": s.theirs.whole} for s in seeds)
    bf16 = Bf16Errors(
        whole=whole["mine"],
        whole_transformers=whole["theirs"],
        params_transformers=medians(s.theirs.params for s in seeds),
        param_ratios=medians(s.param_ratios for s in seeds),
    )
    equal = [s.is_bit_equal for s in seeds if s.is_bit_equal is not None]
    return VerifyResult(
        config=config,
        device=str(device),
        loss=seeds[0].run.steps[0].loss,
        loss_transformers=seeds[0].loss_oracle,
        loss_rel_error=medians({"": relative(s.run.steps[0].loss, s.loss_oracle)} for s in seeds)[""],
        params=params,
        noise_params=_noise([s.mine for s in seeds]),
        bit_equal_to_keep=all(equal) if equal else None,
        moved_bytes=seeds[0].run.moved_bytes,
        bf16=bf16,
    )


def _one_seed(config: VerifyConfig, vocab_size: int, seed: int, device: torch.device) -> _SeedErrors:
    steps = random_batches(config, vocab_size, seed)
    run, is_bit_equal = _our_runs(config, steps, device)
    (reference,) = oracle_steps(config.hf, Oracle.fp64_of_bf16, steps, config.lr, device)
    mine = gradient_errors(run.steps[0].grads, reference.grads)
    (their_run,) = oracle_steps(config.hf, Oracle.bf16, steps, config.lr, device)
    theirs = gradient_errors(their_run.grads, reference.grads)
    blocks = block_errors(their_run.grads, reference.grads)
    # Noise over noise would be a game of dice: where the true gradient is zero, the block's error is the yardstick.
    scales = {n: blocks[block_of(n)] if n in theirs.noise else e for n, e in theirs.params.items()}
    ratios = {name: ratio(error, scales[name]) for name, error in mine.params.items()}
    return _SeedErrors(run, is_bit_equal, reference.loss, mine, theirs, ratios)


def _our_runs(config: VerifyConfig, steps: Any, device: torch.device) -> tuple[OurRun, bool | None]:
    dtype = _DTYPES[config.dtype]
    run = our_steps(config, steps, dtype=dtype, device=device, memory=config.memory)
    if config.memory is config.kept and not config.memory.is_lossy:
        return run, None
    keep = our_steps(config, steps, dtype=dtype, device=device, memory=config.kept, place=KvPlace.hbm)
    return run, all(_same(m, k) for m, k in zip(run.steps, keep.steps, strict=True))


def _same(mine: StepGradients, keep: StepGradients) -> bool:
    return mine.loss == keep.loss and bit_equal(mine.grads, keep.grads)


def _noise(errors: list[GradientErrors]) -> tuple[str, ...]:
    return tuple(sorted(frozenset().union(*(e.noise for e in errors))))


def device_of(config: VerifyConfig, rank: int = 0) -> torch.device:
    """Where a rank computes; every one of them has a GPU of its own, or none has.

    Raises:
        MachineError: cuda is asked for, and there are not as many devices as ranks.
    """
    there = torch.cuda.is_available() and torch.cuda.device_count() >= config.num_ranks
    if config.device is VerifyDevice.cuda and not there:
        found = torch.cuda.device_count() if torch.cuda.is_available() else 0
        sees = f"{found} CUDA device(s) for {config.num_ranks} ranks" if found else "no CUDA device"
        raise MachineError(f"device=cuda: torch sees {sees}; leave device= out, or see `headrace doctor`")
    if not there or config.device is VerifyDevice.cpu:
        return torch.device("cpu")
    return torch.device("cuda") if config.num_ranks == 1 else torch.device("cuda", rank)


def _check_heads(config: VerifyConfig, model: ModelConfig) -> None:
    if model.num_heads % config.ulysses:
        raise InputError(f"parallel.ulysses={config.ulysses}: does not divide the model's {model.num_heads} heads")
    problems = [*degree_problems(config.tensor, config.ulysses, model)]
    if problem := key_heads_problem(config.ulysses, model.num_kv_heads, config.tensor):
        problems.append(problem)
    chunks = default_chunks(config.pipeline_schedule)
    if model.num_layers < config.pipeline * chunks:
        stages = f"parallel.pipeline={config.pipeline}: {config.pipeline} x {chunks} stages"
        problems.append(f"{stages}, and the model has {model.num_layers} layers; lower it")
    if problems:
        raise InputError("\n".join(problems))


def _check_length(config: VerifyConfig, max_position_embeddings: int) -> None:
    if config.seq_len > max_position_embeddings:
        warnings.warn(
            f"seq_len={config.seq_len}: beyond the model's max_position_embeddings={max_position_embeddings}",
            stacklevel=3,
        )
