"""Random number generators of one rank: seeded at start, saved and restored with a checkpoint."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def seed_everything(seed: int, rank: int) -> None:
    """Seed python, numpy and torch (all devices); every rank gets streams of its own."""
    own = (seed * 1_000_003 + rank) % 2**63
    random.seed(own)
    np.random.seed(own % 2**32)
    torch.manual_seed(own)


def rng_state(device: torch.device) -> dict[str, Any]:
    """The state of every generator of this process as plain numbers and text: JSON-able."""
    version, python, python_gauss = random.getstate()
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    return {
        "python": [version, list(python), python_gauss],
        "numpy": [str(name), np.asarray(keys).tolist(), int(position), int(has_gauss), float(gauss)],
        "torch": _to_text(torch.get_rng_state()),
        "cuda": _to_text(torch.cuda.get_rng_state(device)) if device.type == "cuda" else None,
    }


def restore_rng_state(state: Any, device: torch.device) -> None:
    """Inverse of rng_state; a CUDA state is taken where there is one and this rank is on CUDA.

    Raises:
        ValueError: it is not what rng_state returns.
    """
    try:
        version, python, python_gauss = state["python"]
        name, keys, position, has_gauss, gauss = state["numpy"]
        if not 0 <= position <= len(keys):  # numpy does not look, and reads from there
            raise ValueError(f"numpy's position is {position}")
        random.setstate((version, tuple(python), None if python_gauss is None else float(python_gauss)))
        np.random.set_state((name, np.array(keys, dtype=np.uint32), position, int(has_gauss), float(gauss)))
        torch.set_rng_state(_from_text(state["torch"]))
        if device.type == "cuda" and state["cuda"] is not None:
            torch.cuda.set_rng_state(_from_text(state["cuda"]), device)
    except (TypeError, KeyError, ValueError, ArithmeticError, RuntimeError) as error:
        raise ValueError(f"not the state of random generators ({error})") from error


def _to_text(state: torch.Tensor) -> str:
    return state.numpy().tobytes().hex()


def _from_text(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
