"""The process group of a run: gloo on CPU, NCCL (with gloo beside it for host values) on CUDA. One rank has one too."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from headrace.storage.core.errors import InputError, MachineError
from headrace.workers.actors.net import is_loopback, loopback_listener, use_interface
from headrace.workers.job import RankContext

RENDEZVOUS_TIMEOUT_S = 300.0


def pick_device(context: RankContext) -> torch.device:
    """The rank's device. A rank that sees one GPU (as under Ray) takes it, one that sees all takes its own.

    Raises:
        MachineError: there is no such CUDA device. InputError: neither cpu nor cuda.
    """
    if context.device == "cpu":
        return torch.device("cpu")
    if context.device != "cuda":
        raise InputError(f"device {context.device!r} of rank {context.rank}: choose cpu or cuda")
    num_devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    index = 0 if num_devices == 1 else context.local_rank
    if index >= num_devices:
        raise MachineError(
            f"rank {context.rank} needs CUDA device {index} and the process sees {num_devices}; set train.device=cpu, "
            "or start at most one rank per GPU (cluster.gpus_per_node)"
        )
    return torch.device("cuda", index)


@contextmanager
def process_group(context: RankContext, device: torch.device) -> Iterator[None]:
    """Join the group for as long as the block runs.

    On CUDA host tensors travel by gloo: agreeing on a count or a stop flag must not wait for the device.

    Raises:
        InputError: no rendezvous port for a group of several ranks, a rank outside the group, no such interface.
        MachineError: the port is taken, or the others did not come.
    """
    use_interface(context.master_addr, context.interface)
    store = _rendezvous(context)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend,
        store=store,
        rank=context.rank,
        world_size=context.world_size,
        timeout=timedelta(seconds=context.collective_timeout_s),
        device_id=device if device.type == "cuda" else None,
    )
    try:
        yield
        # No rank closes its connections while another still uses them. After an error the others may have ended.
        dist.barrier()
    finally:
        # Meshes and sharded modules hold groups in reference cycles; gloo threads of a group that is still alive at
        # interpreter exit abort the process.
        gc.collect()
        dist.destroy_process_group()


def gathered(value: Any) -> list[Any]:
    """A small host value of every rank, by rank; all ranks call alike."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _rendezvous(context: RankContext) -> dist.Store:
    if not 0 <= context.rank < context.world_size:
        raise InputError(f"rank {context.rank} is not in a group of {context.world_size}")
    if context.world_size == 1:
        return dist.HashStore()
    where = f"{context.master_addr}:{context.master_port}"
    if context.master_port == 0:
        raise InputError(f"{context.world_size} ranks need a rendezvous port: master_port is 0")
    # Ranks of one machine meet on its loopback: torch's own listener takes connections from everywhere.
    listener = None
    try:
        if context.rank == 0 and is_loopback(context.master_addr):
            listener = loopback_listener(context.master_addr, context.master_port)
        return dist.TCPStore(
            context.master_addr,
            context.master_port,
            context.world_size,
            is_master=context.rank == 0,
            timeout=timedelta(seconds=RENDEZVOUS_TIMEOUT_S),
            master_listen_fd=None if listener is None else listener.detach(),
        )
    except (dist.DistError, RuntimeError, OSError) as error:
        raise MachineError(
            f"rank {context.rank} of {context.world_size} could not connect to the other ranks at {where}: {error}"
        ) from error
