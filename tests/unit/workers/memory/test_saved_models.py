"""`spill` with saved tensors away on transformers' own models, and inside its Trainer: the bits of no spill."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from headrace.helpers.training import FOREIGN_KEEP, FOREIGN_SSD, spilled_bytes
from headrace.storage.config import SsdTierConfig, TiersConfig
from headrace.storage.core.records import Direction, Medium
from headrace.workers.memory import spill
from headrace.workers.memory.plan import LayerPlan, MemoryPlan, Residence

transformers = pytest.importorskip("transformers")
HOST, SSD = Residence.host, Residence.ssd
NUM_LAYERS, VOCAB, LENGTH = 4, 64, 24
PLANS = {
    "ssdtrain": "ssdtrain",
    "mixed": MemoryPlan(
        "mixed", (LayerPlan.of(x=SSD, saved=HOST), FOREIGN_SSD, LayerPlan.of(x=HOST, saved=HOST), FOREIGN_KEEP)
    ),
}


def model_of(family: str) -> nn.Module:
    torch.manual_seed(1)
    config = getattr(transformers, f"{family}Config")(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        attention_dropout=0.1,
        use_cache=False,
        pad_token_id=0,
    )
    return getattr(transformers, f"{family}ForCausalLM")(config).train()


def tokens(seed: int) -> torch.Tensor:
    return torch.randint(1, VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(seed))


def train(model: nn.Module) -> list[torch.Tensor]:
    """Losses of two micro-batches, one padded, and the summed gradients."""
    torch.manual_seed(2)
    losses = []
    for seed, padding in ((0, 0), (1, 5)):
        ids = tokens(seed)
        mask = (torch.arange(LENGTH) < LENGTH - padding).expand_as(ids)
        loss = model(input_ids=ids, attention_mask=mask, labels=ids).loss
        loss.backward()
        losses.append(loss.detach())
    return [*losses, *(p.grad for p in model.parameters())]


def equal(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Qwen3", "Gemma"])
def test_bit_equal_with_no_spill(family: str, plan: str, opened, tmp_path: Path) -> None:
    reference, model = train(model_of(family)), model_of(family)
    with spill(model, PLANS[plan], tiers=TiersConfig(ssd=SsdTierConfig(path=str(tmp_path)))):
        assert equal(train(model), reference)
    stored_bytes = spilled_bytes(opened[0].log)
    media = (Medium.ssd,) if plan == "ssdtrain" else (Medium.host, Medium.ssd)
    for medium in media:
        assert stored_bytes[medium] > 0
    # A layer's weights would be seen: no blob has the bytes of one.
    weights = {p.nbytes for p in model.model.layers[0].parameters()}
    activations = {2 * LENGTH * width * 4 for width in (64, 96, 32)}
    stored = {record.num_bytes for record in opened[0].log.records}
    assert not stored & (weights - activations)


class Rows(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = tokens(index)[0]
        return {"input_ids": row, "labels": row}


def run_trainer(model: nn.Module, folder: Path) -> list[Any]:
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=3,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="no",
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        seed=3,
        disable_tqdm=True,
    )
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=Rows(), eval_dataset=Rows())
    trainer.train()
    rows = [(row["loss"], row["grad_norm"]) for row in trainer.state.log_history if "loss" in row]
    return [*rows, *(p.detach().clone() for p in model.parameters())]


def test_inside_transformers_trainer(opened, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    reference, model = run_trainer(model_of("Llama"), tmp_path), model_of("Llama")
    with spill(model, "ssdtrain", tiers=TiersConfig(ssd=SsdTierConfig(path=str(tmp_path)))) as handle:
        seen = run_trainer(model, tmp_path)
        assert handle.waiting_layers() == []
    assert seen[:3] == reference[:3]
    assert equal(seen[3:], reference[3:])
    # Three steps of two micro-batches; evaluation moves nothing.
    records = [r for r in opened[0].log.records if r.direction is Direction.store and r.key.split(".")[3] == "x"]
    assert len(records) == 3 * 2 * (NUM_LAYERS - 1)
