"""Weights from and to Hugging Face folders; broken folders are named, nothing half-written stays."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from headrace.storage.core.errors import InputError, MachineError
from headrace.workers.model.decoder import Decoder
from headrace.workers.model.hf import (
    hf_name,
    iter_weights,
    load_config,
    load_weights,
    save_pretrained,
)

WEIGHTS = "model.safetensors"


def test_sharded_equals_single(hf_folder: Callable[..., Path], case: str) -> None:
    whole, parts = hf_folder(case), hf_folder(case, "8KB")
    assert len(list(parts.glob("*.safetensors"))) > 2
    config = load_config(whole)
    one, many = (dict(iter_weights(folder, config)) for folder in (whole, parts))
    assert sorted(one) == sorted(many) == sorted(dict(Decoder(config, device="meta").named_parameters()))
    assert all(torch.equal(one[name], many[name]) for name in one)


@pytest.mark.parametrize("shard_bytes", [8_000, 10**9])
def test_export_loads_in_transformers_with_equal_logits(
    hf_folder: Callable[..., Path], case: str, tmp_path: Path, shard_bytes: int
) -> None:
    folder = hf_folder(case)
    model = Decoder(load_config(folder))
    load_weights(model, folder)
    save_pretrained(model.named_parameters(), model.config, tmp_path / "out", max_shard_bytes=shard_bytes)
    assert ((tmp_path / "out" / WEIGHTS).exists()) == (shard_bytes > 10**6)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    before = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokens = torch.randint(0, 97, (2, 19), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(theirs(tokens).logits, before(tokens).logits)
        torch.testing.assert_close(theirs(tokens).logits, model(tokens), rtol=1e-4, atol=1e-4)
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_dtype_of_the_export(hf_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = hf_folder("qwen2 tied")
    config = load_config(folder)
    save_pretrained(iter_weights(folder, config), config, tmp_path / "out", dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / WEIGHTS).values()} == {torch.bfloat16}
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype is torch.bfloat16
    again = Decoder(config, dtype=torch.float32)
    load_weights(again, tmp_path / "out")  # bf16 on disk, fp32 in memory
    for name, tensor in iter_weights(folder, config):
        assert torch.equal(again.get_parameter(name), tensor.bfloat16().float())


@pytest.fixture
def broken(hf_folder: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """broken(case, shard): a copy that a test may damage."""

    def copy(case: str = "llama", shard: str = "5GB") -> Path:
        return Path(shutil.copytree(hf_folder(case, shard), tmp_path / "model"))

    return copy


def refuse(folder: Path, *words: str) -> None:
    """Every word is in the message, before the first tensor came."""
    with pytest.raises(InputError) as caught:
        iter_weights(folder, load_config(folder))
    for word in words:
        assert word in str(caught.value), str(caught.value)


def change(folder: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def test_a_truncated_file_names_file_and_tensor(broken: Callable[..., Path]) -> None:
    folder = broken()
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[:-100])
    refuse(folder, WEIGHTS, "tensor ", "cut short", str(len(content)))
    for length in (0, 5, 40):
        (folder / WEIGHTS).write_bytes(content[:length])
        refuse(folder, WEIGHTS, "not a whole safetensors file")


def test_missing_extra_and_misshapen_tensors(broken: Callable[..., Path]) -> None:
    folder = broken()
    norm = "model.layers.1.input_layernorm.weight"
    change(folder, lambda tensors: tensors.update({norm: torch.ones(31)}))
    refuse(folder, WEIGHTS, norm, "(31,)", "(32,)")
    change(folder, lambda tensors: tensors.pop(norm))
    refuse(folder, norm, "missing")
    change(folder, lambda tensors: tensors.update({norm: torch.ones(32), "model.extra": torch.ones(2)}))
    refuse(folder, WEIGHTS, "model.extra", "(2,)")
    change(folder, lambda tensors: tensors.pop("model.extra"))
    change(folder, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    assert len(dict(iter_weights(folder, load_config(folder)))) == 21
    change(folder, lambda tensors: tensors.update({norm: torch.ones(32, dtype=torch.int8)}))
    refuse(folder, norm, "I8")


def test_missing_shard_broken_index_and_old_formats(broken: Callable[..., Path]) -> None:
    folder = broken("llama", "8KB")
    shard = sorted(folder.glob("*.safetensors"))[1]
    content = shard.read_bytes()
    shard.unlink()
    refuse(folder, shard.name, "missing", "model.")
    shard.write_bytes(content)
    index = folder / "model.safetensors.index.json"
    for text in ("{", "{}", json.dumps({"weight_map": {"a": "../b"}})):
        index.write_text(text)
        refuse(folder, index.name, "not an index")
    index.unlink()
    refuse(folder, WEIGHTS, index.name)
    (folder / "pytorch_model.bin").touch()
    refuse(folder, "convert it to safetensors")


def test_a_head_that_is_there_in_a_tied_model(broken: Callable[..., Path]) -> None:
    folder = broken("llama tied")
    change(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    load_weights(Decoder(load_config(folder)), folder)
    change(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}))
    with pytest.raises(InputError, match="tie_word_embeddings"):
        load_weights(Decoder(load_config(folder)), folder)


def test_no_head_in_an_untied_model(broken: Callable[..., Path]) -> None:
    folder = broken()
    change(folder, lambda tensors: tensors.pop("lm_head.weight"))
    refuse(folder, "lm_head.weight", "tie_word_embeddings")


def test_a_config_of_another_model(broken: Callable[..., Path]) -> None:
    folder = broken()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    refuse(folder, "model.layers.1.", "1 layers")


def test_an_export_appears_whole_or_not_at_all(
    hf_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, out = hf_folder("llama"), tmp_path / "out"
    config = load_config(folder)

    def dies() -> Iterator[tuple[str, torch.Tensor]]:
        yield next(iter_weights(folder, config))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_pretrained(dies(), config, out, max_shard_bytes=1)
    with pytest.raises(InputError, match="not given"):
        save_pretrained(list(iter_weights(folder, config))[:-1], config, out)
    with pytest.raises(InputError, match=r"norm\.weight"):
        save_pretrained([("norm.weight", torch.ones(3))], config, out)
    with pytest.raises(InputError, match=r"blocks\.9"):
        save_pretrained([("blocks.9.norm.weight", torch.ones(3))], config, out)
    assert list(tmp_path.iterdir()) == []

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("headrace.workers.model.hf.save_file", full)
    with pytest.raises(MachineError, match="No space left"):
        save_pretrained(iter_weights(folder, config), config, out)
    assert list(tmp_path.iterdir()) == []
    out.mkdir()
    with pytest.raises(InputError, match="exists already"):
        save_pretrained(iter_weights(folder, config), config, out)


def test_one_whole_tensor_at_a_time(hf_folder: Callable[..., Path]) -> None:
    """The source is an iterator: the parameter is filled before the next tensor is made."""
    folder = hf_folder("llama", "8KB")
    model = Decoder(load_config(folder))
    with torch.no_grad():
        for param in model.parameters():
            param.zero_()
    source = iter_weights(folder, model.config)
    name, tensor = next(source)
    assert tensor.shape == model.get_parameter(name).shape
    assert hf_name(name) in load_file(sorted(folder.glob("*.safetensors"))[0])
