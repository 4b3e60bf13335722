"""`spill` on models that are not ours: bit-equal with no spill, and the tiers did carry the bytes."""

from __future__ import annotations

import gc
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import nn

from headrace.helpers.tiers import open_files
from headrace.helpers.training import FOREIGN_HOST, FOREIGN_KEEP, FOREIGN_RECOMPUTE, FOREIGN_SSD, input_bytes_moved
from headrace.storage.config import HostTierConfig, SsdTierConfig, TiersConfig
from headrace.storage.core.errors import InputError, TierFull, TransferFailed
from headrace.storage.core.records import Direction, Medium
from headrace.storage.stack import TierStack
from headrace.workers.memory import spill
from headrace.workers.memory.opaque import RngState
from headrace.workers.memory.plan import MemoryPlan
from headrace.workers.memory.spilling import SpillTiers, find_blocks

WIDTH, NUM_BLOCKS = 48, 4
RECOMPUTE, HOST, SSD = FOREIGN_RECOMPUTE, FOREIGN_HOST, FOREIGN_SSD
KEEP = FOREIGN_KEEP
MIXED = MemoryPlan("mixed", (HOST, KEEP, SSD, RECOMPUTE))
KEEP_FIRST = MemoryPlan("keep first", (KEEP, HOST, SSD, RECOMPUTE), prefetch_layers=2)
PLANS = {
    **{name: name for name in ("keep", "recompute", "offload_host", "offload_ssd")},
    "mixed": MIXED,
    "keep first": KEEP_FIRST,
}


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Dropout(0.1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.inner(x)


def plain() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(8, WIDTH), *(Residual() for _ in range(NUM_BLOCKS)), nn.Linear(WIDTH, 3))


def llama() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=NUM_BLOCKS,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_dropout=0.1,
    )
    return transformers.LlamaForCausalLM(config).train()


def loss_of(model: nn.Module, length: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(length)
    if isinstance(model, nn.Sequential):
        return model(torch.randn(2, length, 8, generator=draw)).square().sum()
    tokens = torch.randint(0, 64, (2, length), generator=draw)
    return model(input_ids=tokens, labels=tokens).loss


def train(model: nn.Module, lengths: tuple[int, ...] = (16, 40, 24)) -> list[torch.Tensor]:
    """Losses of every pass and the summed gradients; longer and shorter inputs in turn."""
    torch.manual_seed(2)
    losses = []
    for length in lengths:
        loss = loss_of(model, length)
        loss.backward()
        losses.append(loss.detach())
    return [*losses, *(p.grad for p in model.parameters())]


def equal(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def tiers(folder: Path, **budgets: float) -> TiersConfig:
    return TiersConfig(
        host=HostTierConfig(budget_gib=budgets.get("host")),
        ssd=SsdTierConfig(path=str(folder), budget_gib=budgets.get("ssd")),
    )


@pytest.mark.filterwarnings("ignore:use_cache")
@pytest.mark.parametrize("make", [plain, llama])
@pytest.mark.parametrize("name", PLANS)
def test_bit_equal_with_no_spill(make, name: str, tmp_path: Path) -> None:
    reference = train(make())
    model = make()
    with spill(model, PLANS[name], tiers=tiers(tmp_path)):
        assert equal(train(model), reference)
    assert not open_files(tmp_path)
    model.zero_grad()
    assert equal(train(model), reference), "the model is as it was"


def test_a_mutant_differs(tmp_path: Path, monkeypatch) -> None:
    # Without the replay of the random generator a block that runs again draws other dropout masks.
    reference, model = train(plain()), plain()
    monkeypatch.setattr(RngState, "replayed", lambda self: nullcontext())
    with spill(model, MIXED, tiers=tiers(tmp_path)):
        mutant = train(model)
    assert torch.equal(mutant[0], reference[0])
    assert not equal(mutant, reference)


@pytest.mark.parametrize("plan", [MIXED, KEEP_FIRST], ids=lambda p: p.name)
def test_the_tiers_carry_what_the_plan_says(plan: MemoryPlan, tmp_path: Path, monkeypatch) -> None:
    opened: list[SpillTiers] = []
    original = SpillTiers.__init__
    monkeypatch.setattr(SpillTiers, "__init__", lambda self, *a: (opened.append(self), original(self, *a))[1])
    model = plain()
    with spill(model, plan, tiers=tiers(tmp_path)):
        train(model, (16, 40))
    for direction in Direction:
        planned = [input_bytes_moved(plan, 2 * length * WIDTH * 4, direction=direction) for length in (16, 40)]
        for medium in (Medium.host, Medium.ssd):
            assert opened[0].log.moved_bytes[medium, direction] == sum(p[medium] for p in planned)


def test_backward_after_the_context(tmp_path: Path) -> None:
    reference, model = plain(), plain()
    torch.manual_seed(3)
    loss_of(reference, 16).backward()
    torch.manual_seed(3)
    with spill(model, "offload_ssd", tiers=tiers(tmp_path)) as handle:
        loss = loss_of(model, 16)
    assert handle.waiting_layers() == [0, 1, 2]
    assert open_files(tmp_path)
    loss.backward()
    assert not open_files(tmp_path)
    assert equal([p.grad for p in model.parameters()], [p.grad for p in reference.parameters()])


def test_a_graph_that_is_dropped_gives_the_tiers_back(tmp_path: Path) -> None:
    model = plain()
    with spill(model, "offload_ssd", tiers=tiers(tmp_path)):
        loss = loss_of(model, 16)
    assert open_files(tmp_path)
    del loss
    gc.collect()
    assert not open_files(tmp_path)


def test_an_exception_gives_the_tiers_back(tmp_path: Path) -> None:
    model = plain()
    loss = torch.zeros(())
    with pytest.raises(KeyError), spill(model, "offload_ssd", tiers=tiers(tmp_path)):  # noqa: PT012
        loss = loss_of(model, 16)
        raise KeyError
    assert not open_files(tmp_path)
    with pytest.raises(RuntimeError, match="is gone"):
        loss.backward()
    assert "forward" not in model[1].__dict__


def test_evaluation_inside_moves_nothing(tmp_path: Path) -> None:
    model = plain()
    with spill(model, "offload_ssd", tiers=tiers(tmp_path)), torch.no_grad():
        loss_of(model, 16)
        assert not open_files(tmp_path)


def test_budgets(tmp_path: Path) -> None:
    model, gib = plain(), 2**-30
    with (
        pytest.raises(TierFull, match=r"tiers\.host\.budget_gib"),
        spill(model, "offload_host", tiers=tiers(tmp_path, host=8192 * gib)),
    ):
        loss_of(model, 16)
    with spill(model, "offload_host", tiers=tiers(tmp_path, host=2 * NUM_BLOCKS * 8192 * gib)):
        (loss_of(model, 16) + loss_of(model, 16)).backward()


def test_blocks_are_found() -> None:
    model = plain()
    assert find_blocks(model) == list(model)[1:-1]
    nested = nn.Sequential(nn.Sequential(*(nn.Linear(4, 4) for _ in range(2))), nn.ModuleList([Residual()]))
    assert find_blocks(nested) == list(nested[1])
    assert len(find_blocks(llama())) == NUM_BLOCKS
    with pytest.raises(InputError, match="blocks="):
        find_blocks(nn.Linear(2, 2))


def test_what_cannot_work_is_refused() -> None:
    model = plain()
    with pytest.raises(InputError, match="ssd=SsdTierConfig"), spill(model, "offload_ssd"):
        pass
    with pytest.raises(InputError, match="memory=auto"), spill(model, "auto"):
        pass
    with pytest.raises(InputError, match="3 layers, the model has 4"), spill(model, MemoryPlan("p", (KEEP,) * 3)):
        pass
    hugging = llama()
    hugging.gradient_checkpointing_enable()
    with pytest.raises(InputError, match="gradient_checkpointing_disable"), spill(hugging, "recompute"):
        pass


def test_planning_imports_no_torch() -> None:
    code = (
        "import sys, headrace.workers.memory.plan, headrace.workers.memory.config, headrace.platform.planning.explain\n"
        "assert not {'torch', 'ray'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    "verb", ["prepare_store", "complete_store", "prepare_load", "complete_load", "discard", "close"]
)
@pytest.mark.parametrize("plan", ["offload_host", "offload_ssd"])
def test_an_error_of_a_verb_keeps_its_text_and_nothing_stays(plan: str, verb: str, tmp_path, monkeypatch) -> None:
    real = getattr(TierStack, verb)

    def broken(*args, **kwargs):
        real(*args, **kwargs)
        raise TransferFailed(f"{verb} met a bad block")

    monkeypatch.setattr(TierStack, verb, broken)
    first = "the loop failed" if verb == "close" else f"{verb} met a bad block"
    handles = []

    def loop() -> None:
        model = plain()
        with spill(model, plan, tiers=TiersConfig(ssd=SsdTierConfig(path=str(tmp_path)))) as handle:
            handles.append(handle)
            model(torch.randn(4, 8)).sum().backward()
            raise ValueError("the loop failed")

    with pytest.raises((TransferFailed, ValueError)) as caught:
        loop()
    assert str(caught.value) == first
    assert handles[0].waiting_layers() == []
    assert open_files(tmp_path) == []
