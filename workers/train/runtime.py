"""Process-wide settings of torch that a run needs, restored at its end."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from headrace.storage.core.errors import InputError
from headrace.workers.job import RankContext
from headrace.workers.train.config import TrainConfig
from headrace.workers.train.rng import seed_everything

CUBLAS_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


def num_threads_of(train: TrainConfig, context: RankContext) -> int:
    """Intra-op threads of a CPU rank: train.num_threads, or this process's cores shared with the node's other ranks.

    Raises:
        InputError: train.num_threads is below 1.
    """
    if train.num_threads is not None:
        if train.num_threads < 1:
            raise InputError(f"train.num_threads={train.num_threads}: at least 1, or leave it out")
        return train.num_threads
    return max(1, len(os.sched_getaffinity(0)) // context.local_world_size)


@contextmanager
def torch_runtime(train: TrainConfig, context: RankContext) -> Iterator[None]:
    """Threads, deterministic kernels and seeds for as long as the block runs; a CUDA memory limit ends with it.

    Under a launcher OMP_NUM_THREADS is often 1, which would starve a CPU rank: the number is set here, not inherited.
    """
    was_threads, was_deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    was_warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    was_filling = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    if context.device == "cpu":
        torch.set_num_threads(num_threads_of(train, context))
    elif train.deterministic:
        os.environ.setdefault(CUBLAS_WORKSPACE, ":4096:8")  # read by cuBLAS when its first handle is made
    # With it cuDNN's LSE has another layout, which the blockwise backward would copy for every block.
    os.environ.pop("TORCH_CUDNN_SDPA_AVOID_RECOMPILE", None)
    torch.use_deterministic_algorithms(train.deterministic)
    # Nothing here reads memory that was not written; filling every new buffer costs a pass over it.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    seed_everything(train.seed, context.rank)
    try:
        yield
    finally:
        torch.set_num_threads(was_threads)
        if context.device == "cuda":
            torch.cuda.set_per_process_memory_fraction(1.0)  # the meter may have lowered it
        torch.use_deterministic_algorithms(was_deterministic, warn_only=was_warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = was_filling  # type: ignore[attr-defined]
