"""A new user's path: a Hugging Face folder and a file of chats to `train`, `export`, an answer in transformers."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from headrace.platform.cli.main import main

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

# No end token has this name anywhere: it must come from the folder's files.
STOP = "<|over|>"
TEMPLATE = (
    "{%- for message in messages -%}<|turn|>{{ message['role'] }}\n{{ message['content'] }}<|over|>{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|turn|>assistant\n' }}{%- endif -%}"
)
CHATS = {
    "What colour is the sky?": "The sky is blue.",
    "How many legs has a spider?": "A spider has eight legs.",
    "Where does the sun rise?": "The sun rises in the east.",
    "What do bees make?": "Bees make honey.",
}


def messages(question: str, answer: str | None = None) -> list[dict[str, str]]:
    turns = [{"role": "user", "content": question}]
    return turns if answer is None else [*turns, {"role": "assistant", "content": answer}]


def make_tokenizer() -> Any:
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|turn|>", STOP, "<|pad|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    bpe.train_from_iterator([f"user assistant {question} {answer}" for question, answer in CHATS.items()], trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=STOP, pad_token="<|pad|>", chat_template=TEMPLATE
    )


def targets(tokenizer: Any) -> list[tuple[torch.Tensor, int]]:
    """(ids of a chat, where its answer begins), as transformers renders them."""
    found = []
    for question, answer in CHATS.items():
        asked = tokenizer.apply_chat_template(
            messages(question), add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        whole = tokenizer.apply_chat_template(messages(question, answer), return_dict=True, return_tensors="pt")
        assert torch.equal(whole["input_ids"][:, : asked["input_ids"].shape[1]], asked["input_ids"])
        found.append((whole["input_ids"], asked["input_ids"].shape[1]))
    return found


def mean_loss(model: Any, tokenizer: Any) -> torch.Tensor:
    """Of all tokens that an assistant says, the stop token included."""
    losses = []
    for ids, begin in targets(tokenizer):
        logits = model(input_ids=ids).logits[0, begin - 1 : -1].float()
        losses.append(torch.nn.functional.cross_entropy(logits, ids[0, begin:], reduction="none"))
    return torch.cat(losses).mean()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model that has learnt half of its answers, as `save_pretrained` writes it."""
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=4096,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    while True:
        loss = mean_loss(model, tokenizer)
        if loss < 0.3:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    folder = tmp_path / "my-model"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def headrace(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Runs a verb in the test's folder, here or as a process of its own; returns what it printed."""

    def here(*words: str) -> str:
        monkeypatch.chdir(tmp_path)
        assert main(words) == 0
        return capsys.readouterr().out

    def as_a_process(*words: str) -> str:
        command = [sys.executable, "-m", "headrace.platform.cli.main", *words]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=3000)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return here if request.param == "here" else as_a_process


@pytest.mark.parametrize(
    ("headrace", "more"),
    [
        # A Ray of its own is started in test_terminal.py.
        pytest.param("here", ["train.steps=6", "cluster=inline"], id="six steps"),
        pytest.param("process", [], marks=[pytest.mark.soak, pytest.mark.ray], id="three words"),
    ],
    indirect=["headrace"],
)
def test_three_words_train_and_the_export_answers_in_transformers(
    headrace: Callable[..., str], more: list[str], folder: Path, tmp_path: Path
) -> None:
    lines = [json.dumps({"messages": messages(*chat)}) for chat in CHATS.items()]
    (tmp_path / "chats.jsonl").write_text("\n".join(lines) + "\n")
    said = headrace("train", "model.init_from=my-model", "data=jsonl", "data.source=chats.jsonl", *more)
    (run,) = (path.parent for path in (tmp_path / "runs").glob("*/config.yaml"))
    assert run.name in said

    given = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    before = float(mean_loss(given, tokenizer).detach())
    losses = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert math.isclose(losses[0], before, rel_tol=1e-4)  # these weights, these targets
    assert losses[-1] < losses[0]

    headrace("export", f"run={run}", "out=mine")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "mine")
    copied = transformers.AutoTokenizer.from_pretrained(tmp_path / "mine")
    assert float(mean_loss(model, copied).detach()) < before
    assert copied.chat_template == TEMPLATE
    stop = copied.convert_tokens_to_ids(STOP)
    assert (copied.eos_token, copied.eos_token_id, model.generation_config.eos_token_id) == (STOP, stop, stop)
    for question, answer in CHATS.items():
        asked = copied.apply_chat_template(
            messages(question), add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        ids = model.generate(**asked, max_new_tokens=60, do_sample=False)[0, asked["input_ids"].shape[1] :]
        assert ids[-1] == stop
        assert copied.decode(ids, skip_special_tokens=True) == answer
