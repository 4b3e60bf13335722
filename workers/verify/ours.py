"""headrace's side: the decoder under a memory plan, its tiers opened small for the check."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from headrace.storage.build import open_stack
from headrace.storage.config import TiersConfig
from headrace.storage.core.cleanup import CleanUps
from headrace.storage.core.ledger import PAGE_BYTES
from headrace.storage.core.records import Lease, Medium
from headrace.storage.stack import TierStack
from headrace.storage.tiers.host_slab import HostSlab
from headrace.storage.tiers.ssd_slab import SsdSlab
from headrace.storage.transfer_log import TransferLog
from headrace.workers.data.batch import TokenBatch
from headrace.workers.memory.chunk_plan import KvShape, pass_bytes
from headrace.workers.memory.config import KvPlace, MemoryPreset, SparseConfig
from headrace.workers.memory.plan import Cuts, MemoryPlan, Residence, Stretch, Sweep
from headrace.workers.memory.policy import MemoryHandle, skeletons_of
from headrace.workers.memory.presets import Choices, preset_plan
from headrace.workers.memory.schedule import moved_bytes
from headrace.workers.memory.sweeps import apply_plan, open_sweep
from headrace.workers.model.config import ModelConfig
from headrace.workers.model.decoder import Decoder
from headrace.workers.model.hf import hf_name, load_config, load_weights
from headrace.workers.model.skeleton import Skeleton
from headrace.workers.model.tensor_cut import shared
from headrace.workers.parallel.apply import parallelize
from headrace.workers.parallel.collectives import Traffic
from headrace.workers.parallel.pipeline.by_stage import ByStage, most_in_flight
from headrace.workers.train.config import Precision
from headrace.workers.verify.config import ROW_DEGREES, VerifyConfig
from headrace.workers.verify.ranks import Sharing
from headrace.workers.verify.steps import StepGradients, deterministic, run_steps

_HOLDER = "one-process"
NUM_TILES = 4


@dataclass(frozen=True)
class OurRun:
    """Every step's loss and gradients, and the bytes that moved, by "direction/tier"."""

    steps: list[StepGradients]
    moved_bytes: dict[str, int]


def our_steps(
    config: VerifyConfig,
    steps: Sequence[Sequence[TokenBatch]],
    *,
    dtype: torch.dtype,
    device: torch.device,
    memory: MemoryPreset,
    place: KvPlace = KvPlace.host,
) -> OurRun:
    """Load the folder into our decoder and run every step under the plan of `memory`; `place` is that of chunk_sparse.

    Raises:
        InputError: config.json or the weights cannot be used.
        MachineError: no room for the tiers.
    """
    model = load_decoder(config, dtype=dtype, device=device)
    sharing = Sharing.of(config, device, model.config)
    part = None if sharing is None else sharing.part
    degrees = {name: getattr(config, name) for name in ROW_DEGREES}
    skeletons = [shared(skeleton, **degrees) for skeleton in skeletons_of(model.blocks)]
    cuts = Cuts(-(-config.own_rows // NUM_TILES), head_groups=config.head_groups, codec=config.codec)
    plan = verify_plan(memory, skeletons, config.own_rows, config.own_chunk, place=place, cuts=cuts)
    log = TransferLog()
    if part is not None:
        part.cut(model, sharing.meshes.stages if sharing is not None else None)
        plan, skeletons = plan.of_layers(part.layers), [skeletons[layer] for layer in part.layers]
    wanted = _tier_bytes(plan, skeletons, model.config, config, dtype.itemsize)
    if part is not None:
        wanted = {tier: num_bytes * most_in_flight(part.pipeline) for tier, num_bytes in wanted.items()}
    with deterministic(), open_tiers(wanted, device, log) as stack, CleanUps() as closing:
        if sharing is None:
            handle = apply_plan(model, plan, stack, meter=None, bucket_plans=None)
        else:
            precision = Precision.bf16 if dtype is torch.bfloat16 else Precision.fp32
            mesh, context = sharing.meshes.params, sharing.context
            layers = None if part is None else part.layers
            handle = parallelize(
                model, mesh=mesh, precision=precision, context=context, plan=plan, stack=stack, layers=layers
            )
        closing.callback(handle.remove)
        results = run_decoder(model, handle, steps, config, sharing)
    moved = {f"{way.value}/{tier.value}": count for (tier, way), count in sorted(log.moved_bytes.items(), key=str)}
    return OurRun(results, moved)


def verify_plan(
    memory: MemoryPreset,
    skeletons: Sequence[Skeleton],
    seq_len: int,
    chunk_size: int | None = None,
    *,
    place: KvPlace = KvPlace.host,
    cuts: Cuts | None = None,
) -> MemoryPlan:
    """The preset's plan in four token tiles, with numbers that put something into every place that it uses."""
    size = chunk_size or max(1, 3 * seq_len // 10)
    by_age = (
        Stretch(0, size, Residence.hbm),
        Stretch(size, 2 * size, Residence.host),
        Stretch(2 * size, None, Residence.ssd),
    )
    choices = Choices(
        seq_len,
        host_fraction=0.5,
        ssd_fraction=0.25,
        inputs_on_ssd=0.5,
        kept_parts=3,
        chunk_size=size,
        kv=by_age if memory is MemoryPreset.chunk_auto else (),
        sparse=SparseConfig(page=max(1, size // 8), budget=6, sink=1, recent=1, place=place),
    )
    return preset_plan(memory, skeletons, cuts=cuts or Cuts(-(-seq_len // NUM_TILES)), choices=choices)


def _tier_bytes(
    plan: MemoryPlan, skeletons: Sequence[Skeleton], model: ModelConfig, config: VerifyConfig, itemsize: int
) -> dict[Medium, int]:
    """What one micro-batch fills of every tier."""
    if plan.sweep is Sweep.by_chunk:
        sizes = {"batch_size": config.batch, "num_tokens": config.seq_len, "itemsize": itemsize}
        return pass_bytes(plan, skeletons, KvShape.of(skeletons, **sizes, window=model.sliding_window)).slots
    return moved_bytes(
        plan,
        skeletons,
        batch_size=config.batch,
        num_tokens=config.own_rows,
        itemsize=itemsize,
        round_to=PAGE_BYTES,
    )


def load_decoder(config: VerifyConfig, *, dtype: torch.dtype, device: torch.device) -> Decoder:
    """Our decoder with the folder's weights, in evaluation mode. Raises InputError as load_config and load_weights."""
    model = Decoder(load_config(config.hf), dtype=dtype, device=device)
    load_weights(model, Path(config.hf))
    return model.eval()


def run_decoder(
    model: Decoder,
    handle: MemoryHandle,
    steps: Sequence[Sequence[TokenBatch]],
    config: VerifyConfig,
    sharing: Sharing | None = None,
) -> list[StepGradients]:
    """Run every step as the training engine does: sums of token losses, divided by the count of the whole step."""
    dtype, device = next(model.parameters()).dtype, next(model.parameters()).device

    def gradients(index: int, own: Sequence[TokenBatch], num_targets: int) -> list[torch.Tensor]:
        if sharing is not None and sharing.part is not None and sharing.lines is not None:
            stages = ByStage(
                *(model, handle, None, sharing.part, sharing.lines),
                traffic=Traffic(),
                loss_tile=config.loss_tile,
                dtype=dtype,
                device=device,
            )
            return stages.forward_backward(own, num_targets, step=index)
        sweep = open_sweep(model, handle, None, loss_tile=config.loss_tile, itemsize=dtype.itemsize)
        return [
            sweep.forward_backward(
                batch, num_targets, step=index, micro_batch=micro_batch, is_last=micro_batch == len(own) - 1
            )
            for micro_batch, batch in enumerate(own)
        ]

    def backward(index: int, batches: Sequence[TokenBatch]) -> float:
        num_targets = max(1, sum(batch.num_targets for batch in batches))
        own = batches if sharing is None else [sharing.split(batch) for batch in batches]
        total = torch.stack(gradients(index, own, num_targets)).double().sum()
        return float((total if sharing is None else sharing.add_up(total)) / num_targets)

    named = [(hf_name(name), param) for name, param in model.named_parameters()]
    found = run_steps(named, backward, steps, config.lr)
    return found if sharing is None else [sharing.of_all_stages(step) for step in found]


@contextmanager
def open_tiers(
    wanted: dict[Medium, int],
    device: torch.device,
    log: TransferLog,
    *,
    tiers: TiersConfig | None = None,
    folders: Sequence[Path | str] = (),
) -> Iterator[TierStack | None]:
    """Slabs of just the size that one pass of the plan needs, for this process; None where nothing moves.

    Args:
        tiers: engine and checksums. folders: of the files, one per drive; none takes that of temporary files.

    Raises:
        MachineError: no room for them.
    """
    tiers = tiers or TiersConfig()
    run_id = f"{_HOLDER}{os.getpid()}"
    with CleanUps() as undo:
        leases: list[Lease] = []
        if wanted[Medium.host]:
            host = HostSlab(wanted[Medium.host], run_id=run_id)
            undo.callback(host.close)
            leases.append(host.lease(_HOLDER, wanted[Medium.host]))
        if wanted[Medium.ssd]:
            ssd = SsdSlab(folders or tempfile.gettempdir(), wanted[Medium.ssd], direct=tiers.ssd.direct)
            undo.callback(ssd.close)
            leases.append(ssd.lease(_HOLDER, wanted[Medium.ssd]))
        if not leases:
            yield None
            return
        stack = open_stack(leases, tiers, device=device, log=log)
        undo.callback(stack.close)
        yield stack
