"""`headrace verify`: does headrace compute what transformers computes, on this checkpoint?"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING, get_type_hints

from headrace.platform.config.load import load_run_config
from headrace.platform.config.words import CONF_WORD, environment_words
from headrace.platform.keys import read_keys, split_flags
from headrace.storage.core.errors import InputError
from headrace.workers.model.remote_model import local_model
from headrace.workers.verify.config import DEGREES, PARALLEL, VerifyConfig, check_config

if TYPE_CHECKING:
    from headrace.workers.verify.verify import VerifyResult

USAGE = """\
usage: headrace verify hf=DIR|URL [KEY=VALUE ...] [--json]
       headrace verify conf=FILE.yaml [KEY=VALUE ...] [--json]     the folder that a recipe's model.init_from names

Runs the model of a Hugging Face folder (config.json and safetensors) in transformers and in headrace on the same random
tokens and prints the error of the loss and of every parameter's gradient.

  dtype=fp64|fp32|bf16   precision, each with its own reference and bound (NUMERICS.md); default: fp64;
                         float64, float32 and bfloat16 mean the same
  seq_len=128            tokens per row
  batch=1                rows of a micro-batch
  micro_batches=1        passes whose gradients add up to a step
  documents=1            documents packed into a row, without attention across them
  responses=0            so many responses behind every document, their prompt, which is run once for all of them
  steps=1                optimizer steps; gradients of each are compared
  memory=keep|recompute|offload_host|offload_ssd|alst|memo|ssdtrain
                         every value other than keep is also compared with keep, to the bit
  memory=chunk|chunk_host|chunk_ssd|chunk_auto
                         chunks pass through all layers in turn; all but chunk are also compared with chunk, to the bit
  memory=chunk_sparse    lossy: errors are shown and not judged; residence is compared to the bit
  chunk_size=N           tokens of a chunk; default: three tenths of the row
  parallel.tensor=1      ranks that share the weights of every block and the rows of the vocabulary; all ranks are
                         started here
  parallel.ulysses=1     ranks that share the tokens of a row and, in attention, its heads
  parallel.ring=1        ranks that share the tokens of a row and pass keys and values on
  parallel.pipeline=1    ranks that have some of the blocks each; give micro_batches at least as many
  parallel.pipeline_schedule=1f1b|interleaved|zbv|v_half
                         order of their passes; zbv and v_half have the gradients of weights apart
  parallel.vocabulary=last_stage|vocab_1|vocab_2
                         who has the rows of the vocabulary: the ends of the pipeline, or each rank a part
  head_groups=1          groups of KV heads that attention runs one after another, for plans by layer
  codec=eight_bit_token|four_bit_group
                         lossy: holds gate, up and residual in it (memory=keep or ssdtrain, dtype=fp32 or bf16)
  seed=0                 seed of the tokens
  lr=0.001               learning rate of the steps
  loss_tile=1024         tokens whose logits exist at one time
  device=auto|cpu|cuda

Exit codes: 0 within the bounds, 1 outside, 2 bad input.
"""


def run(argv: Sequence[str]) -> int:
    """Run `headrace verify ...`.

    Args:
        argv: words after `verify`; those of HEADRACE_OVERRIDES come before them.

    Returns:
        0 within the bounds, 1 outside, 2 without arguments.

    Raises:
        InputError: unknown words, keys or values, or a folder that cannot be used.
    """
    flags, words = split_flags(argv, ("--json",))
    words = [*environment_words(os.environ), *words]
    if not words:
        print(USAGE, end="")
        return 2
    config = parse_words(with_recipe(words))
    config = replace(config, hf=str(local_model(config.hf)))
    check_config(config)
    from headrace.workers.verify.verify import verify

    result = verify(config)
    if "--json" in flags:
        print(json.dumps(result.to_json(), allow_nan=False), flush=True)
    else:
        print(as_table(result))
    return 1 if result.failures() else 0


def parse_words(words: Sequence[str]) -> VerifyConfig:
    """`key=value` words to a VerifyConfig.

    Raises:
        InputError: a word without `=`, an unknown or repeated key, a value of another type, or no hf=.
    """
    hints = get_type_hints(VerifyConfig)
    keys = {f"parallel.{f.name}" if f.name in PARALLEL else f.name: hints[f.name] for f in fields(VerifyConfig)}
    values = {key.removeprefix("parallel."): value for key, value in read_keys(words, keys).items()}
    if "hf" not in values:
        raise InputError("hf=DIR is missing; give a folder with config.json and *.safetensors")
    return VerifyConfig(**values)


def with_recipe(words: Sequence[str]) -> list[str]:
    """The words with `hf=` in place of a recipe or an experiment: the folder that it trains from.

    Raises:
        InputError: it cannot be read, or starts from random weights.
    """
    chosen = [word for word in words if word.partition("=")[0] in (CONF_WORD, "experiment")]
    rest = [word for word in words if word not in chosen]
    if not chosen or any(word.startswith("hf=") for word in rest):
        return rest
    folder = load_run_config(chosen, environ={}).config.model.init_from
    if folder is None:
        raise InputError(f"{chosen[-1]}: names no model.init_from; give hf=DIR")
    return [f"hf={folder}", *rest]


def as_table(result: VerifyResult) -> str:
    """One line a parameter, then the verdict."""
    config, noise = result.config, set(result.noise_params)
    width = max(len(name) for name in result.params)
    lines = [
        f"{config.hf}: {config.dtype.value} on {result.device}, {config.micro_batches} x {config.batch} x "
        f"{config.seq_len} tokens, memory={config.memory.value}"
        + "".join(f", parallel.{name}={degree}" for name in DEGREES if (degree := getattr(config, name)) > 1)
        + "".join(
            f", parallel.{name}={getattr(config, name).value}"
            for name in PARALLEL
            if name not in DEGREES and config.pipeline > 1
        ),
        f"loss {result.loss:.12g}, transformers {result.loss_transformers:.12g}",
        "",
        f"{'relative error of':<{width}}",
        f"{'loss':<{width}}  {result.loss_rel_error:.2e}",
    ]
    for name, error in result.params.items():
        line = f"{name:<{width}}  {error:.2e}"
        if result.bf16 is not None:
            line += f"  transformers {result.bf16.params_transformers[name]:.2e}"
            line += f"  ratio {result.bf16.param_ratios[name]:.2f}"
        lines.append(line + ("  (no true gradient: relative to its block's)" if name in noise else ""))
    lines.append("")
    if result.bf16 is not None:
        bf16 = result.bf16
        lines.append(
            f"whole gradient: {bf16.whole:.2e}, transformers {bf16.whole_transformers:.2e}, "
            f"ratio {bf16.whole_ratio:.2f}"
        )
    if result.bit_equal_to_keep is not None:
        moved = ", ".join(f"{way} {count:,} bytes" for way, count in result.moved_bytes.items())
        lines.append(
            f"bit-equal to {config.kept_words}: {result.bit_equal_to_keep}" + (f"; moved: {moved}" if moved else "")
        )
    failures = result.failures()
    lines += [f"FAIL  {failure}" for failure in failures]
    passed = "PASS  every bound holds (NUMERICS.md, section 2)"
    if config.is_lossy:
        why = "attention leaves pages out" if config.memory.is_lossy else "gradients are taken from codes"
        passed = f"LOSSY  {why}: no bound holds for the errors above (NUMERICS.md, section 4)"
    lines.append(f"{len(failures)} bound(s) broken" if failures else passed)
    return "\n".join(lines)
