"""transformers' side: the same folder, run as plainly as it can be."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from torch.nn import functional as F

from headrace.kernels.api import IGNORED_TARGET
from headrace.storage.core.errors import InputError, MachineError
from headrace.workers.data.batch import TokenBatch
from headrace.workers.verify.steps import StepGradients, run_steps


class Oracle(StrEnum):
    """Which run of transformers is the reference.

    fp64: weights widened to fp64, norms in fp64.
    fp64_of_bf16: weights rounded to bf16 first, then the same.
    fp32, bf16: transformers as it is.
    """

    fp64 = "fp64"
    fp64_of_bf16 = "fp64_of_bf16"
    fp32 = "fp32"
    bf16 = "bf16"


_LOADED_AS = {
    Oracle.fp64: torch.float64,
    Oracle.fp64_of_bf16: torch.bfloat16,
    Oracle.fp32: torch.float32,
    Oracle.bf16: torch.bfloat16,
}


class InputDtypeRMSNorm(nn.Module):
    """transformers' RMSNorm without its cast to fp32: weight * x / sqrt(mean(x^2) + eps), in the dtype of x.

    Args:
        norm: the module it replaces; its weight is shared, so the parameter keeps its name.
    """

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.weight = norm.weight
        self.eps = float(norm.variance_epsilon)  # type: ignore[arg-type]

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(..., width) to the same shape and dtype."""
        variance = hidden.pow(2).mean(-1, keepdim=True)
        return self.weight * (hidden * torch.rsqrt(variance + self.eps))  # type: ignore[operator]


def load_oracle(folder: Path | str, oracle: Oracle, device: torch.device) -> nn.Module:
    """transformers' causal model of `folder` with SDPA attention, in evaluation mode (no dropout).

    Raises:
        MachineError: transformers is not installed.
        InputError: transformers cannot read the folder, or the weights do not fill the model.
    """
    try:
        import transformers
    except ImportError:
        raise MachineError(
            "verify compares with transformers, which is not installed: pip install transformers"
        ) from None
    quiet = transformers.utils.logging
    was_level, had_bars = quiet.get_verbosity(), quiet.is_progress_bar_enabled()
    quiet.set_verbosity_error()
    quiet.disable_progress_bar()
    try:
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
            str(folder),
            dtype=_LOADED_AS[oracle],
            attn_implementation="sdpa",
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise InputError(f"hf={folder}: transformers cannot load it: {error}") from error
    finally:
        quiet.set_verbosity(was_level)
        if had_bars:
            quiet.enable_progress_bar()
    model, info = loaded
    lacking = sorted(str(name) for key in ("missing_keys", "mismatched_keys") for name in info[key])
    if lacking:
        raise InputError(f"hf={folder}: transformers finds no fitting weights for {', '.join(lacking[:5])}")
    model = model.to(device).eval()
    if oracle in (Oracle.fp64, Oracle.fp64_of_bf16):
        model = model.double()
        _norm_in_input_dtype(model)
    return model


def _norm_in_input_dtype(model: nn.Module) -> None:
    norms = [(name, module) for name, module in model.named_modules() if type(module).__name__.endswith("RMSNorm")]
    if not norms:
        raise InputError("the model has no RMSNorm module: its fp64 oracle is not known here")
    for name, norm in norms:
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, InputDtypeRMSNorm(norm))


def mean_loss(model: nn.Module, batches: Sequence[TokenBatch]) -> torch.Tensor:
    """Mean token loss over all valid targets of the micro-batches, a scalar with gradient.

    Documents are run one by one, as sequences of their own: the plainest meaning of "no attention across documents".
    One that continues another is run behind it; only its own targets count there.
    Cross-entropy is taken on the logits in fp64 where the model is fp64, in fp32 otherwise (what transformers does).
    """
    device = next(model.parameters()).device
    logits, targets = [], []
    for batch in batches:
        for tokens, positions, wanted in _sequences(batch):
            _forget_lengths(model)
            out: Any = model(input_ids=tokens.to(device), position_ids=positions.to(device), use_cache=False)
            logits.append(out.logits.flatten(0, 1))
            targets.append(wanted.flatten().to(device))
    every = torch.cat(logits)
    if every.dtype is not torch.float64:
        every = every.float()
    return F.cross_entropy(every, torch.cat(targets), ignore_index=IGNORED_TARGET)


def _sequences(batch: TokenBatch) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Tokens, positions and targets, (rows, length) each: the batch, or one document at a time where it is packed."""
    rows, columns = batch.tokens.shape
    if batch.packing.lengths == (columns,) * rows:
        yield batch.tokens, torch.arange(columns).expand(rows, -1), batch.targets
        return
    packing = batch.packing
    own_tokens, own_targets = (part.flatten().split(list(packing.lengths)) for part in (batch.tokens, batch.targets))
    for number, (prefix, targets) in enumerate(zip(packing.prefixes, own_targets, strict=True)):
        path = [*reversed(packing.ancestors(number)), number]
        tokens = torch.cat([own_tokens[document] for document in path])
        wanted = torch.cat([targets.new_full((prefix,), IGNORED_TARGET), targets])
        yield tokens[None], torch.arange(len(tokens))[None], wanted[None]


def _forget_lengths(model: nn.Module) -> None:
    """Dynamic rotary scaling in transformers keeps the base of the longest sequence so far; every one starts afresh."""
    for module in model.modules():
        if getattr(module, "rope_type", None) == "dynamic":
            module.inv_freq = module.original_inv_freq.clone()  # type: ignore[operator]
            module.max_seq_len_cached = module.original_max_seq_len


def oracle_steps(
    folder: Path | str, oracle: Oracle, steps: Sequence[Sequence[TokenBatch]], lr: float, device: torch.device
) -> list[StepGradients]:
    """Load the model and run every step. Errors as load_oracle."""
    model = load_oracle(folder, oracle, device)

    def backward(index: int, batches: Sequence[TokenBatch]) -> float:
        loss = mean_loss(model, batches)
        loss.backward()
        return float(loss.detach())

    return run_steps(model.named_parameters(), backward, steps, lr)
