"""A tokenizer's files travel from its folder through prepared data, checkpoint and export, unchanged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from headrace.helpers.training import tiny_job
from headrace.platform.cli.main import main
from headrace.workers.job import RankContext
from headrace.workers.model import generation
from headrace.workers.train.session import run_rank

CHATS = [
    [
        {"role": "system", "content": "Answer in one word."},
        {"role": "user", "content": f"the river turns wheel {i}?"},
        {"role": "assistant", "content": f"wheel {i} ä水"},
    ]
    for i in range(12)
]
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|fin|>", "<|blank|>"]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_tokenizer(folder: Path) -> dict[str, bytes]:
    """A tokenizer of a chat model whose end is none of the usual ones."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([json.dumps(CHATS)], trainer)
    files: dict[str, Any] = {
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 77},
        "special_tokens_map.json": {"eos_token": "<|im_end|>", "pad_token": "<|blank|>"},
        "added_tokens.json": {text: number for number, text in enumerate(SPECIAL)},
        "generation_config.json": {"eos_token_id": [2, 1], "pad_token_id": 3, "top_k": 7, "do_sample": True},
    }
    contents = {name: json.dumps(value, indent=3).encode() for name, value in files.items()}
    contents["tokenizer.json"] = tokenizer.to_str().encode()
    contents["chat_template.jinja"] = CHATML.encode()
    contents["additional_chat_templates/rag.jinja"] = b"{{ documents }}"
    (folder / "additional_chat_templates").mkdir(parents=True)
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return contents


def prepared(folder: Path, *words: str) -> Path:
    source = folder / "chats.jsonl"
    source.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in CHATS))
    assert main(["data", "prepare", f"source={source}", f"out={folder / 'rows'}", "seq_len=128", *words]) == 0
    return folder / "rows"


def trained_and_exported(folder: Path, rows: Path) -> tuple[Path, Path]:
    """A run of one step on the rows, and its export."""
    vocab_size = json.loads((rows / "meta.json").read_text())["vocab_size"]
    job = tiny_job(
        folder,
        train={"steps": 1},
        checkpoint={"at_end": True},
        model={"vocab_size": vocab_size},
        data={"prepared": str(rows), "seq_len": 128},
    )
    run_rank(job, RankContext(), on_step=lambda report: None, should_stop=lambda: False)
    assert main(["export", f"run={job.run_dir}", f"out={folder / 'hf'}"]) == 0
    return Path(job.run_dir), folder / "hf"


def ids_of_the_first_chat(rows: Path) -> list[int]:
    tokens, flags = (np.load(rows / name)[0] for name in ("tokens.npy", "flags.npy"))
    starts = np.flatnonzero(flags & 1)
    return tokens[: starts[1]].tolist()


def rendered(folder: Path, **options: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    return theirs.apply_chat_template(CHATS[0], tokenize=True, return_dict=False, **options)


def test_a_tokenizer_travels_unchanged(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")
    contents = write_tokenizer(tmp_path / "tokenizer")
    rows = prepared(tmp_path, f"tokenizer={tmp_path / 'tokenizer'}")
    run_dir, exported = trained_and_exported(tmp_path, rows)
    for folder in (rows, run_dir / "checkpoints" / "step_000001", exported):
        for name, content in contents.items():
            assert (folder / name).read_bytes() == content, folder / name
    chat = rendered(exported)
    assert chat == rendered(tmp_path / "tokenizer")
    assert ids_of_the_first_chat(rows)[: len(chat)] == chat
    config = transformers.AutoConfig.from_pretrained(exported)
    assert config.eos_token_id == [2, 1]
    model = transformers.AutoModelForCausalLM.from_pretrained(exported)
    assert model.generation_config.eos_token_id == [2, 1]
    assert model.generation_config.top_k == 7
    capsys.readouterr()
    for place in (f"run={run_dir}", f"hf={exported}"):
        for token, stops in ((1, True), (2, True), (3, False), (9, False)):
            logits = torch.nn.functional.one_hot(torch.tensor(token), config.vocab_size).float()
            monkeypatch.setattr(generation, "_next_logits", lambda *_, logits=logits: logits)
            assert main(["generate", place, "--prompt", "the", "max_new_tokens=3", "temperature=0", "--json"]) == 0
            answer = json.loads(capsys.readouterr().out.splitlines()[-1])
            assert answer["tokens"] == ([token] if stops else [token] * 3)
            assert answer["stopped"] == stops


def test_the_built_in_chat_template_travels(tmp_path: Path) -> None:
    rows = prepared(tmp_path, "bpe_vocab_size=300")
    _, exported = trained_and_exported(tmp_path, rows)
    assert (exported / "chat_template.jinja").read_bytes() == (rows / "chat_template.jinja").read_bytes()
    assert rendered(exported) == ids_of_the_first_chat(rows)
    prompt = rendered(exported, add_generation_prompt=True)
    answer = rendered(exported)
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(exported)
    assert prompt[: len(answer)] == answer
    assert theirs.decode(prompt[len(answer) :]) == "\n<|assistant|>\n"
    masked = theirs.apply_chat_template(CHATS[0], return_dict=True, return_assistant_tokens_mask=True)
    targets = [token for token, counts in zip(masked["input_ids"], masked["assistant_masks"], strict=True) if counts]
    assert theirs.decode(targets) == CHATS[0][2]["content"] + "<|endoftext|>"


def test_data_without_chats_has_no_chat_template(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("the river turns a wheel " * 50)
    rows = tmp_path / "rows"
    words = ["seq_len=16", "bpe_vocab_size=300"]
    assert main(["data", "prepare", f"source={tmp_path / 'a.txt'}", f"out={rows}", *words]) == 0
    assert not (rows / "chat_template.jinja").exists()
    (rows / "tokenizer_config.json").unlink()
    assert main(["data", "info", str(rows)]) == 2
