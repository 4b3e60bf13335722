"""The decoder: Llama, Qwen2, Qwen3 and Mistral in one plain module, told apart by its ModelConfig.

Parameters have the leaf names of transformers: `blocks.3.mlp.up_proj.weight` is `model.layers.3.mlp.up_proj.weight`
there (workers/model/hf.py). A tied head is no parameter of its own: the embedding is used twice.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed import ProcessGroup

from headrace.kernels.api import (
    ChunkAxis,
    LossOptions,
    Operators,
    Packing,
    linear_cross_entropy,
    rope_frequencies,
    rope_tables,
)
from headrace.storage.core.errors import InputError
from headrace.workers.model.config import NO_ADAPTER, AdapterConfig, ModelConfig, RopeType
from headrace.workers.model.dense import norm_program
from headrace.workers.model.layers import Block, RMSNorm, Rope
from headrace.workers.model.lora import add_adapters, initial_adapter, is_adapter
from headrace.workers.model.program import RowPart
from headrace.workers.parallel.context import SplitPacking

CPU = torch.device("cpu")


class VocabularyShards(Protocol):
    """Rows of the vocabulary that tensor ranks share; see workers/parallel/tensor.py. t: their number."""

    group: ProcessGroup
    on_sent: Callable[[int], None]

    def look_up(self, embedding: nn.Embedding, tokens: torch.Tensor) -> torch.Tensor:
        """(B, n t) tokens of all tensor ranks, side by side, to this rank's embedded ones, (B, n, H)."""
        ...

    def side_by_side(self, table: torch.Tensor) -> torch.Tensor:
        """(B, n t, D) to (B, n, t D)."""
        ...

    def gather(self, hidden: torch.Tensor) -> torch.Tensor:
        """(B, n, H) of this rank to (B, n t, H) of all."""
        ...

    def rows(self, weight: torch.Tensor) -> torch.Tensor:
        """This rank's rows of (V, H)."""
        ...


@dataclass(frozen=True)
class StagePass:
    """A pass through some of the blocks: one stage of a pipeline.

    Args:
        hidden: gives (B, T, H) of the stage before, and keeps nothing; None: the stage begins with the look-up.
        blocks: in forward order.
        has_head: whether norm, head and loss follow.
        has_norm: whether the norm follows, and no head.
    """

    hidden: Callable[[], torch.Tensor] | None
    blocks: Sequence[nn.Module]
    has_head: bool
    has_norm: bool = False


class Decoder(nn.Module):
    """Embedding, blocks, final norm, head.

    Args:
        dtype: of the parameters, and of the computation unless FSDP's mixed precision says otherwise.
        device: `meta` makes a model without memory; fill it before use. The weights are not initialised here.
        operators: who computes.
        adapter: what is trained; with adapters every other parameter is frozen.

    Raises:
        InputError: sizes that do not fit together.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        operators: Operators | None = None,
        adapter: AdapterConfig = NO_ADAPTER,
    ) -> None:
        super().__init__()
        check_config(config)
        self.config = config
        self.operators = operators = operators or Operators()
        # On meta first: torch's layers would draw random weights that are written over at once.
        meta = torch.device("meta")
        self.embed_tokens = nn.Embedding(
            config.vocab_size, config.hidden_size, config.pad_token_id, dtype=dtype, device=meta
        )
        self.blocks = nn.ModuleList(
            Block(config, config.mixer_of(layer), dtype=dtype, device=meta, operators=operators)
            for layer in range(config.num_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype, device=meta, operators=operators)
        self.norm.program = norm_program(config, operators)  # type: ignore[assignment]
        self.lm_head: nn.Linear | None = None
        if not config.tie_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False, dtype=dtype, device=meta)
        if adapter.is_on:
            add_adapters(self, adapter)
        if torch.device(device) != meta:
            self.to_empty(device=device)
        self.shards: VocabularyShards | None = None  # None: every rank has all rows of the vocabulary
        # No buffer: to_empty() would leave garbage in it, and a cast of the model would round it.
        self._frequencies: dict[torch.device, torch.Tensor] = {}

    @property
    def head_weight(self) -> torch.Tensor:
        """(V, H): the head's own weight, or the embedding where they are tied."""
        return self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def forward(
        self,
        tokens: torch.Tensor,
        targets: torch.Tensor | None = None,
        *,
        packing: Packing | None = None,
        loss_tile: int = 1024,
        part: RowPart | None = None,
        each: bool = False,
        stage: StagePass | None = None,
    ) -> torch.Tensor:
        """Loss or logits.

        Args:
            tokens: (B, T) int64.
            targets: (B, T) int64, shifted already; -100 does not count.
            packing: documents inside the rows; positions start at 0 in each, or behind the document that it continues.
                None: every row is one document.
            loss_tile: tokens whose logits exist at once.
            part: which part of the rows (B, T) tokens and targets are; packing stays that of the whole rows. The
                blocks must know the tokens before it (chunk_sweep.py). None: they are whole rows.
            each: the loss of every token in place of the sum; its gradient costs one more product (kernels/loss).
            stage: of a pipeline, in place of the whole model.

        Returns:
            With targets: the scalar sum of token losses, fp32 (fp64 for an fp64 model), or (B, T) of them, 0 where a
            target does not count. Without: logits (B, T, V), of this rank's rows of the vocabulary. Of a part that is
            for its keys: what leaves the last block, which nobody needs. Of a stage without the head: what the next one
            takes, (B, T, H).
        """
        hidden = self.hidden_states(tokens, packing, part, stage)
        if (part is not None and part.is_for_keys) or (stage is not None and not stage.has_head):
            # A copy: what leaves the norm may be a view, of which FSDP2 warns.
            return self.norm(hidden).clone() if stage is not None and stage.has_norm else hidden
        hidden, weight, shards = self.norm(hidden), self.head_weight, self.shards
        if shards is not None:
            hidden, weight = shards.gather(hidden), shards.rows(weight)
        if targets is None:
            return F.linear(hidden, weight)
        # The same tiles whatever the machine: another cut is another order of summation.
        options = LossOptions(axis=ChunkAxis.vocabulary if each else ChunkAxis.tokens, tokens_per_chunk=loss_tile)
        return linear_cross_entropy(
            hidden,
            weight,
            targets,
            reduction="none" if each else "sum",
            group=None if shards is None else shards.group,
            options=options if shards is None else replace(options, on_sent=shards.on_sent),
            backend=self.operators.kernels,
        )

    def hidden_states(
        self,
        tokens: torch.Tensor,
        packing: Packing | None = None,
        part: RowPart | None = None,
        stage: StagePass | None = None,
    ) -> torch.Tensor:
        """(B, T) to what leaves the last block, (B, T, H), before the final norm."""
        shards, hidden = self.shards, None if stage is None else stage.hidden
        if hidden is not None:
            x = hidden()
        else:
            x = self.embed_tokens(tokens) if shards is None else shards.look_up(self.embed_tokens, tokens)
        rope = self.row_rope(tokens, packing, part or RowPart((0, tokens.shape[1]), tokens.shape[1]), x.dtype)
        if shards is not None:
            rope = shards.side_by_side(rope[0]), shards.side_by_side(rope[1])
        for block in self.blocks if stage is None else stage.blocks:
            x = block(x, rope, packing)
        return x

    def row_rope(self, tokens: torch.Tensor, packing: Packing | None, part: RowPart, dtype: torch.dtype) -> Rope:
        """cos and sin tables of (B, n) tokens, (B, n, D) each in `dtype`; (1, n, D) where all rows are alike.

        Args:
            packing: documents of the whole rows.
            part: of the rows that the tokens are.
        """
        (batch_size, _), seq_len, (begin, end) = tokens.shape, part.num_tokens, part.span
        if isinstance(packing, SplitPacking):
            seq_len, (begin, end) = packing.seq_len, (0, tokens.shape[1])
        elif packing is None or packing.is_one_per_row(batch_size, seq_len):
            return self.rope(torch.arange(begin, end, device=tokens.device)[None], dtype, lengths=(seq_len,))
        packing.check(batch_size, seq_len)
        positions = packing.positions(batch_size, seq_len, tokens.device, part.span)
        scaling, documents = self.config.rope_scaling, None
        if scaling is not None and scaling.type is RopeType.dynamic:
            documents = packing.documents(batch_size, seq_len)[:, begin:end]
            sequences = zip(packing.prefixes, packing.sequence_lengths, strict=True)
            longest = max((length for prefix, length in sequences if prefix), default=0)
            if longest > scaling.original_max_position:
                raise InputError(
                    f"a prompt and its response have {longest} tokens: beyond {scaling.original_max_position} the "
                    "model's dynamic rotary scaling depends on the length of each sequence, so that responses cannot "
                    "share their prompt; prepare the data with data.share_prompts=false"
                )
        return self.rope(positions, dtype, lengths=packing.sequence_lengths, documents=documents)

    def rope(
        self,
        positions: torch.Tensor,
        dtype: torch.dtype,
        *,
        lengths: Sequence[int],
        documents: torch.Tensor | None = None,
    ) -> Rope:
        """cos and sin tables, (B, T, D) each in `dtype`, computed in fp32.

        Args:
            positions: (B, T), or (1, T) where all rows are alike.
            lengths: tokens of the sequences that the positions lie in, those before them included: one for all, or one
                for each document in turn. Dynamic scaling depends on it.
            documents: (B, T) number of every token's document, where there are several lengths.
        """
        config, device = self.config, positions.device
        scaling = config.rope_scaling
        scale = 1.0 if scaling is None else scaling.table_scale
        if scaling is None or scaling.type is not RopeType.dynamic or max(lengths) <= scaling.original_max_position:
            if device not in self._frequencies:
                self._frequencies[device] = rope_frequencies(config.head_size, config.rope_theta, scaling).to(device)
            return rope_tables(positions, self._frequencies[device], dtype, scale)
        of_length = {n: rope_frequencies(config.head_size, config.rope_theta, scaling, n) for n in sorted(set(lengths))}
        if documents is None:
            return rope_tables(positions, of_length[lengths[0]].to(device), dtype, scale)
        of_token = torch.stack([of_length[n] for n in lengths])[documents]
        return rope_tables(positions, of_token.to(device), dtype, scale)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Give every parameter its first value; see initial_weight. The model must not be on meta."""
        for name, param in self.named_parameters():
            param.copy_(initial_weight(name, param.shape, seed=seed, std=self.config.init_std))


def initial_weight(name: str, shape: torch.Size, *, seed: int, std: float, device: torch.device = CPU) -> torch.Tensor:
    """First value of one parameter, fp32: norms 1, biases 0, adapters as PEFT, other matrices normal with `std`.

    A function of seed, name and kind of device: neither the order, nor the number of ranks, nor the dtype changes it.
    """
    if name.endswith("bias"):
        return torch.zeros(shape, device=device)
    if name.endswith("norm.weight"):
        return torch.ones(shape, device=device)
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    if is_adapter(name):
        return initial_adapter(name, shape, generator)
    return torch.empty(shape, dtype=torch.float32, device=device).normal_(0.0, std, generator=generator)


def initial_weights(
    config: ModelConfig,
    seed: int,
    device: torch.device = CPU,
    adapter: AdapterConfig = NO_ADAPTER,
    *,
    wanted: Callable[[str], bool] = lambda name: True,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and first value of every parameter whose name is `wanted`, as whole tensors in the order of the model.

    A generator of the CPU draws on one core, so as many tensors are drawn at once as torch has threads; no more than
    that many wait in memory.
    """
    model = Decoder(config, device="meta", adapter=adapter)
    shapes = [(name, param.shape) for name, param in model.named_parameters() if wanted(name)]
    num_threads = torch.get_num_threads() if device.type == "cpu" else 1
    with ThreadPoolExecutor(num_threads) as pool:

        def draw(number: int) -> Future[torch.Tensor]:
            name, shape = shapes[number]
            return pool.submit(initial_weight, name, shape, seed=seed, std=config.init_std, device=device)

        ahead = deque(draw(number) for number in range(min(num_threads, len(shapes))))
        for number, (name, _) in enumerate(shapes):
            value = ahead.popleft().result()
            if number + num_threads < len(shapes):
                ahead.append(draw(number + num_threads))
            yield name, value


def check_config(config: ModelConfig) -> None:
    """Refuse sizes that make no decoder.

    Raises:
        InputError: names the key, its value and the remedy.
    """
    positive = ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "intermediate_size")
    for name in positive:
        if getattr(config, name) < 1:
            remedy = "; it is set from the tokenizer when the data is prepared" if name == "vocab_size" else ""
            raise InputError(f"model.{name}={getattr(config, name)}: at least 1 is expected{remedy}")
    if not config.mixers:
        raise InputError("model.mixers=[]: name one mixer for every layer, or one for all")
    if config.num_heads % config.num_kv_heads:
        raise InputError(
            f"model.num_kv_heads={config.num_kv_heads}: choose a divisor of model.num_heads={config.num_heads}"
        )
    if config.head_dim is None and config.hidden_size % config.num_heads:
        raise InputError(
            f"model.num_heads={config.num_heads}: must divide model.hidden_size={config.hidden_size}, or give "
            "model.head_dim"
        )
    if config.head_size % 2:
        raise InputError(f"model.head_dim={config.head_size}: rotary positions need an even number")
    if config.pad_token_id is not None and not -config.vocab_size <= config.pad_token_id < config.vocab_size:
        raise InputError(f"model.pad_token_id={config.pad_token_id}: beyond model.vocab_size={config.vocab_size}")
    if config.sliding_window is not None and config.sliding_window < 1:
        raise InputError(f"model.sliding_window={config.sliding_window}: at least 1, or null for none")
