"""The tasks of blocks under a plan by layer: passes, transfers and what goes over the network. No torch.

Costs are those of platform/planning/cost.py, and the order is that of workers/memory/shelf.py:

    forward    the block's input leaves as the block starts, its other tensors when it has run. The block after the next
               one waits until the bytes have left
    backward   loads start `prefetch_layers` block calls ahead, of any micro-batch; where no other one comes between
               a block's forward and its backward, the last blocks load nothing: their bytes are still there

Gathers and scatters of tensor parallelism, and ulysses' exchange, stand between blocks; ring and FSDP2 run beside them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from headrace.platform.planning.communication import gathered
from headrace.platform.planning.predict import BlockCost
from headrace.platform.planning.request import PlanRequest
from headrace.platform.planning.simulate.engine import Simulation, Stream, What
from headrace.platform.planning.simulate.network import GRADIENT_BYTES, Network, Traffic, traffic
from headrace.storage.core.errors import InputError
from headrace.workers.memory.plan import LayerPlan, MemoryPlan, Residence
from headrace.workers.memory.schedule import STORES_IN_FLIGHT, num_forwarded
from headrace.workers.model.adapter import weights_of
from headrace.workers.model.skeleton import Kind

Task = int | None
LINK_KEYS = {"h2d": "h2d_gbps", "d2h": "d2h_gbps", "ssd_read": "ssd_read_gbps", "ssd_write": "ssd_write_gbps"}
SHARED = {"h2d": "host read", "d2h": "host write", "ssd_read": "drive read", "ssd_write": "drive write"}
STREAM_OF = {"h2d": Stream.h2d, "d2h": Stream.d2h, "ssd_read": Stream.ssd_read, "ssd_write": Stream.ssd_write}


@dataclass(frozen=True)
class Part:
    """What one rank does: its blocks, under its plan.

    Args:
        request: of its blocks; one micro-batch.
    """

    request: PlanRequest
    plan: MemoryPlan
    network: Network

    @property
    def batch_tokens(self) -> int:
        """Of all rows of a micro-batch, not divided by any degree."""
        return self.request.batch_size * self.request.seq_len


@dataclass(frozen=True)
class BlockTimes:
    """One block under its layer plan. Seconds and bytes.

    Args:
        early / late: bytes by link (d2h, ssd_write) that leave as the block starts, and when it has run.
        runs_attention: whether backward runs attention again, and with it its exchanges.
        gathered_again: what backward gathers and scatters again between tensor ranks, over what forward does.
    """

    forward_s: float
    backward_s: float
    rerun_s: float
    weight_grad_s: float
    cost: BlockCost
    early: dict[str, float]
    late: dict[str, float]
    runs_attention: bool
    gathered_again: float


class Rank:
    """Adds the tasks of one rank to a simulation, in the order in which the rank does them.

    Args:
        node: number of the node, whose links its copies share with its other ranks.
        gathers_once: weights stay gathered from the first to the last micro-batch of a step.

    Raises:
        InputError: a rate that the plan needs is not known; names the key.
    """

    def __init__(
        self, simulation: Simulation, role: int, part: Part, *, node: int = 0, gathers_once: bool = False
    ) -> None:
        self._simulation, self.role, self.part, self._node = simulation, role, part, node
        self.last: Task = None  # the compute task that was added last
        self._gathers_once = gathers_once
        self._request = part.request.with_cuts(part.plan.cuts)
        self.cost = self._request.cost()
        self.flops = _known(self._request.rates().flops, "fp32_tflops (bf16_tflops)", self._request)
        request = self._request
        self._traffic: Traffic = traffic(
            request.model, part.network.dims, batch_tokens=part.batch_tokens, itemsize=request.itemsize
        )
        skeletons = request.skeletons()
        self._weights = sum(map(weights_of, skeletons)) / len(skeletons)
        self._kinds = [skeletons.index(skeleton) for skeleton in skeletons]  # the first block that is like it
        self._times = lru_cache(maxsize=None)(self._times_of)
        self._stores: dict[tuple[str, int], list[Task]] = {}
        self._gathered: dict[int, Task] = {}
        self._starts: dict[int, Task] = {}
        self._calls: list[Task] = []  # the start of every block call

    @property
    def head_s(self) -> float:
        """Seconds of norm, head and loss, forward and backward."""
        cost = self.cost
        blocks = cost.num_layers * (cost.block_flops + cost.backward_flops)
        return (cost.whole_flops - blocks) / self.flops

    @property
    def num_layers(self) -> int:
        """Blocks of the rank."""
        return len(self.part.plan.layers)

    def times(self, layer: int) -> BlockTimes:
        """Of one of its blocks."""
        return self._times(self.part.plan.layers[layer], self._kinds[layer])

    def _times_of(self, layer: LayerPlan, kind: int) -> BlockTimes:
        request, shape = self._request, self._request.shape(self.part.plan, kind)
        cost = shape.cost(layer)
        skeleton = shape.schedule.skeleton
        tokens, pairs = shape.batch_size * shape.rows, shape.pairs((0, shape.rows))
        linear = sum(s.flops(tokens, pairs) for s in skeleton.segments if s.kind is Kind.linear and not s.frozen)
        root = layer.stretches.get(skeleton.root.name, ())
        place = root[0].residence if len(root) == 1 else None
        num_bytes = tokens * skeleton.root.bytes_per_token(request.itemsize)
        host, ssd = (
            min(cost_, num_bytes) if place is where else 0
            for cost_, where in ((cost.host, Residence.host), (cost.ssd, Residence.ssd))
        )
        mixed = [name for s in skeleton.segments if s.kind is Kind.mix for name in s.made]
        whole = shape.rows * sum(segment.gathered for segment in skeleton.segments)
        return BlockTimes(
            forward_s=self.cost.block_flops / self.flops,
            backward_s=self.cost.backward_flops / self.flops,
            rerun_s=cost.rerun_flops / self.flops,
            weight_grad_s=linear / self.flops,
            cost=cost,
            early={"d2h": host + ssd, "ssd_write": ssd},
            late={"d2h": cost.away - host - ssd, "ssd_write": cost.ssd - ssd},
            runs_attention=any(
                name not in layer.stretches or any(s.residence is Residence.recompute for s in layer.stretches[name])
                for name in mixed
            ),
            gathered_again=gathered(shape.schedule, layer, shape.rows) / whole if whole else 0.0,
        )

    def forward(self, layers: range, label: str, needs: Iterable[Task] = ()) -> Task:
        """Forward of some blocks, one micro-batch; the last task, whose output the next stage wants."""
        before: Task = self._join([self.last, *needs])
        for place, layer in enumerate(layers):
            times, name = self.times(layer), f"{label} block {layer}"
            waits = [before, self._gather(layer, name, self._starts[layer - 1] if place else before)]
            if place >= STORES_IN_FLIGHT:
                waits += self._stores.get((label, layers[place - STORES_IN_FLIGHT]), [])
            moved = self.move(times.early, What.store, name, waits)
            start = self._join(waits)
            self._starts[layer] = start
            self._calls.append(start)
            run = self._compute(What.forward, times.forward_s, name, [start])
            moved += self.move(times.late, What.store, name, [run])
            if moved:
                self._stores[label, layer] = moved
            passed = self._ring(self._traffic.ring, name, start)
            before = self._join([self.exchange(1.0, 1.0, name, run), passed])
            self.last = before
        if len(layers) >= STORES_IN_FLIGHT:
            self.last = before = self._join([before, *self._stores.get((label, layers[-STORES_IN_FLIGHT]), [])])
        return before

    def backward(
        self, layers: range, label: str, needs: Iterable[Task] = (), *, splits: bool = False, ends: bool = True
    ) -> Task:
        """Backward of some blocks.

        Args:
            splits: gradients of the weights come later (weight_grads).
            ends: it is the last of the step: gradients are reduced behind each block.
        """
        ahead = self.part.plan.prefetch_layers
        order = list(reversed(layers))
        starts = [self._join([self.last, *needs])]
        loads: dict[int, list[Task]] = {}
        # In a pipeline other micro-batches come between a stage's forward and its backward: loads begin in those.
        earlier = self._calls[-ahead:] if ahead and self._request.in_flight > 1 else []
        is_top = layers[-1:] == range(self.num_layers)[-1:] and self._request.in_flight == 1
        num_kept = num_forwarded(ahead, with_norm=self.cost.norm is not None) if is_top else 0

        def load(place: int) -> None:
            if place < len(order) and place not in loads:
                cost, layer = self.times(order[place]).cost, order[place]
                amounts = {} if place < num_kept else {"h2d": cost.away, "ssd_read": cost.ssd}
                begins = earlier[place - ahead] if place - ahead >= -len(earlier) and place < ahead else starts[-1]
                waits = [begins, *self._stores.get((label, layer), [])]
                loads[place] = self.move(amounts, What.load, f"{label} block {layer}", waits)

        for place, layer in enumerate(order):
            times, name = self.times(layer), f"{label} block {layer}"
            self._calls.append(starts[-1])
            for later in range(place, place + ahead + 1):
                load(later)
            waits = [
                starts[-1],
                *loads[place],
                self._gather(layer, name, self._starts[layer + 1] if place else starts[0]),
            ]
            start = self._join(waits)
            self._starts[layer] = start
            seconds = times.backward_s + times.rerun_s - (times.weight_grad_s if splits else 0.0)
            run = self._compute(What.backward, seconds, name, [start])
            again = self._traffic.ring if times.runs_attention else 0.0
            passed = self._ring(self._traffic.ring_backward + again, name, start)
            self.last = self._join(
                [self.exchange(1.0 + times.gathered_again, 1.0 + times.runs_attention, name, run), passed]
            )
            if ends:
                self.weights(1, GRADIENT_BYTES, name, [run])
            starts.append(self.last)
        return self.last

    def pass_seconds(self, layers: range) -> tuple[float, float, float]:
        """Forward, and backward without and of the weights, with what stands between blocks; copies are not in it."""
        sent, exchanged = self._traffic.tensor, self._traffic.ulysses
        per_tensor = sent / self.part.network.tensor()[1] if sent else 0.0
        per_exchange = exchanged / self.part.network.ulysses()[1] if exchanged else 0.0
        forward = backward = weights = 0.0
        for layer in layers:
            times = self.times(layer)
            forward += times.forward_s + per_tensor + per_exchange
            again = per_tensor * times.gathered_again + per_exchange * times.runs_attention
            backward += times.backward_s + times.rerun_s - times.weight_grad_s + per_tensor + per_exchange + again
            weights += times.weight_grad_s
        return forward, backward, weights

    def weight_grads(self, layers: range, label: str) -> Task:
        """Gradients of the weights of some blocks."""
        self.last = self._compute(
            What.weight_grad, sum(self.times(layer).weight_grad_s for layer in layers), label, [self.last]
        )
        return self.last

    def send(self, num_bytes: float, label: str, needs: Iterable[Task]) -> Task:
        """What goes to another stage."""
        stream, rate = self.part.network.stages()
        return self._add(stream, What.pipeline, num_bytes, rate, label, needs)

    def compute(self, what: What, seconds: float, label: str, needs: Iterable[Task]) -> Task:
        """A pass."""
        self.last = self._compute(what, seconds, label, needs)
        return self.last

    def _compute(self, what: What, seconds: float, label: str, needs: Iterable[Task]) -> Task:
        return self._simulation.add(self.role, Stream.compute, what, seconds, needs=needs, label=label)

    def _join(self, needs: Iterable[Task]) -> Task:
        found = sorted({need for need in needs if need is not None})
        if len(found) < 2:
            return found[0] if found else None
        return self._simulation.add(self.role, Stream.compute, What.forward, 0.0, needs=found)

    def move(self, amounts: Mapping[str, float], what: What, label: str, needs: Sequence[Task]) -> list[Task]:
        """Copies; amounts in bytes by link (LINK_KEYS). They run at the same time."""
        found: list[Task] = []
        profile = self._request.profile
        for link, num_bytes in amounts.items():
            if num_bytes > 0:
                rate = _known(
                    profile.link_bytes_per_s(getattr(profile, LINK_KEYS[link])), LINK_KEYS[link], self._request
                )
                rate /= self._request.ranks_per_device if link in ("h2d", "d2h") else 1
                shared = shared_link(self._node, link)
                stream = STREAM_OF[link]
                found.append(self._add(stream, what, num_bytes, rate, label, needs, link=shared))
        return found

    def _add(
        self, stream: Stream, what: What, amount: float, rate: float, label: str, needs: Iterable[Task], **link: str
    ) -> Task:
        add = self._simulation.add
        return add(self.role, stream, what, amount, rate=rate, needs=needs, label=label, **link)

    def exchange(self, tensor: float, ulysses: float, label: str, run: Task) -> Task:
        """Gathers of tensor parallelism and exchanges of ulysses, of so many blocks; nothing runs beside them."""
        for what, num_bytes, where in (
            (What.context, ulysses * self._traffic.ulysses, self.part.network.ulysses),
            (What.tensor, tensor * self._traffic.tensor, self.part.network.tensor),
        ):
            if num_bytes > 0:
                stream, rate = where()
                run = self._add(stream, what, num_bytes, rate, label, [run])
        return run

    def _ring(self, num_bytes: float, label: str, start: Task) -> Task:
        if num_bytes <= 0:
            return None
        stream, rate = self.part.network.ring()
        return self._add(stream, What.context, num_bytes, rate, label, [start])

    def _gather(self, layer: int, label: str, start: Task) -> Task:
        """The block's weights, gathered from `start` on, where the block before it starts."""
        if self._gathers_once and layer in self._gathered:
            return self._gathered[layer]
        self._gathered[layer] = self.weights(1, self._request.itemsize, label, [start])
        return self._gathered[layer]

    def weights(self, blocks: float, itemsize: int, label: str, needs: Sequence[Task]) -> Task:
        """Gathers the weights, or reduces the gradients, of so many blocks; None without shards."""
        shards = self.part.network.dims.fsdp
        if shards == 1:
            return None
        stream, rate = self.part.network.weights()
        num_bytes = (shards - 1) / shards * blocks * self._weights * itemsize
        return self._add(stream, What.weights, num_bytes, rate, label, needs)


def shared_link(node: int, link: str) -> str:
    """Name of what the copies of a node's ranks share: its host memory, or its drives."""
    return f"node {node} {SHARED[link]}"


def shared_rates(request: PlanRequest, node: int, ranks_per_role: int) -> dict[str, float]:
    """Rates of a node's shared links, for one rank of each role.

    Args:
        ranks_per_role: ranks of the node with the same work: they share with each other too.
    """
    profile = request.profile
    rates = {
        "h2d": profile.host_gbps,
        "d2h": profile.host_gbps,
        "ssd_read": profile.ssd_read_gbps,
        "ssd_write": profile.ssd_write_gbps,
    }
    found = {shared_link(node, link): profile.link_bytes_per_s(gbps) for link, gbps in rates.items()}
    return {name: rate / ranks_per_role for name, rate in found.items() if rate is not None}


def _known(rate: float | None, key: str, request: PlanRequest) -> float:
    if rate is None:
        raise InputError(
            f"hardware.{key} is not known for hardware={request.profile.name}, and the timeline needs it; set it, or "
            "measure it with `headrace doctor --profile`"
        )
    return rate
