"""What tests of `verify` share: the comparison of a tiny folder, and settings of rope and shared prompts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from headrace.workers.verify.config import VerifyConfig, VerifyDevice
from headrace.workers.verify.verify import VerifyResult, verify

DYNAMIC = {"rope_parameters": {"rope_type": "dynamic", "factor": 3.0}, "max_position_embeddings": 6}
YARN = {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 6}}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
# Documents whose responses share a prompt, in two rows.
SHARED = {"seq_len": 33, "batch": 2, "documents": 2, "responses": 3}
MakeFolder = Callable[..., Path]
Mutant = Callable[[pytest.MonkeyPatch], None]


def soak_unless(short: bool, *values: Any) -> Any:
    """A parameter set, which is part of the long form alone unless `short`."""
    return pytest.param(*values, marks=() if short else pytest.mark.soak)


def run(folder: Path, **fields: Any) -> VerifyResult:
    """`verify` of a folder on the CPU, 24 tokens a row unless said otherwise."""
    return verify(VerifyConfig(hf=str(folder), **{"seq_len": 24, "device": VerifyDevice.cpu, **fields}))
