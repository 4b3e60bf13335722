"""Several responses to one prompt: what rows hold of them, against every response with a prompt of its own."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from headrace.helpers.tiers import has_id
from headrace.helpers.tiny_models import LLAMA
from headrace.storage.core.errors import ErrorId, InputError
from headrace.workers.data import prepare as module
from headrace.workers.data.batch import TokenBatch, to_batch
from headrace.workers.data.config import DataConfig, Loader
from headrace.workers.data.loader import open_loader
from headrace.workers.data.opening import open_prepared
from headrace.workers.data.prepare import prepare_into
from headrace.workers.data.prepared import PreparedData
from headrace.workers.data.rows import CONTINUES, PADDING, STARTS, TARGET
from headrace.workers.model.decoder import Decoder
from headrace.workers.train.config import TrainConfig

Config = Callable[..., DataConfig]
WriteJsonl = Callable[..., Path]
Sequences = list[tuple[tuple[int, ...], tuple[bool, ...]]]
WORDS = ["the", "river", "turns", "a", "wheel", "and", "the", "stone", "grinds", "Mühle"]


def words(draw: random.Random, most: int) -> str:
    return " ".join(draw.choice(WORDS) for _ in range(draw.randint(1, most)))


def records(num: int = 25) -> list[dict[str, Any]]:
    """Texts and chats, with one to six responses; some begin alike, one is empty, one ends inside a word."""
    draw, found = random.Random(7), list[dict[str, Any]]()
    for number in range(num):
        prompt, answers = "grind " + words(draw, 15), [words(draw, 8) for _ in range(draw.randint(1, 6))]
        if number % 5 == 0:
            found.append({"text": words(draw, 30)})
        elif number % 2:
            found.append({"prompt": prompt + ("" if number % 3 else " "), "responses": [*answers, ""]})
        else:
            turns = [{"role": "user", "content": words(draw, 5)}, {"role": "assistant", "content": words(draw, 5)}]
            messages = [*turns, {"role": "user", "content": prompt}]
            question = {"role": "user", "content": "more?"}
            more = [{"role": "assistant", "content": answers[0]}, question, {"role": "assistant", "content": "no"}]
            turn = {"role": "assistant", "content": answers[0] + " at last"}
            found.append({"messages": messages, "responses": [*answers, turn, more]})
    return found


def documents(data: PreparedData) -> Iterator[tuple[list[int], list[int]]]:
    """Ids and flags of every document of all rows."""
    for array in data.arrays:
        for tokens, flags in zip(np.load(array.tokens_path), np.load(array.flags_path), strict=True):
            borders = [*np.flatnonzero(flags & STARTS), len(flags)]
            for begin, end in itertools.pairwise(borders):
                yield tokens[begin:end].tolist(), flags[begin:end].tolist()


def sequences(data: PreparedData) -> Sequences:
    """Every document behind what it continues, and which of its tokens count; in any order."""
    found, prompt = [], list[int]()
    for ids, flags in documents(data):
        own = bool(flags[0] & CONTINUES)
        if flags[0] & PADDING or not any(flag & TARGET for flag in flags):
            prompt = ids
            continue
        before = prompt if own else []
        prompt = prompt if own else ids
        counts = [False] * len(before) + [(flag & (STARTS | TARGET)) == TARGET for flag in flags]
        found.append((tuple(before + ids), tuple(counts)))
    return sorted(found)


@pytest.fixture
def source(write_jsonl: WriteJsonl) -> Path:
    return write_jsonl(records())


@pytest.fixture
def apart(source: Path, data_config: Config, tmp_path: Path) -> PreparedData:
    """Every response with a prompt of its own, in rows that cut none."""
    config = data_config(source, seq_len=160, buckets=[40, 160], share_prompts=False)
    return prepare_into(config, tmp_path / "apart")


@pytest.mark.parametrize("rows", [{"seq_len": 160}, {"seq_len": 160, "buckets": [30, 80, 160]}])
def test_rows_hold_every_prompt_once_and_the_same_sequences(
    apart: PreparedData, source: Path, data_config: Config, tmp_path: Path, rows: dict[str, Any]
) -> None:
    # Texts alone are cut by rows of one length.
    own = [record for record in records() if "responses" in record]
    source.write_text("\n".join(map(module.json.dumps, own)))
    config = data_config(source, tokenizer=str(apart.folder), **rows)
    shared = prepare_into(config, tmp_path / "shared")
    alone = prepare_into(
        data_config(source, tokenizer=str(apart.folder), seq_len=160, buckets=[160], share_prompts=False),
        tmp_path / "alone",
    )
    assert sequences(shared) == sequences(alone)
    assert shared.num_target_tokens == alone.num_target_tokens
    assert shared.num_documents == alone.num_documents == sum(len(record["responses"]) for record in own)
    assert shared.num_responses == shared.num_documents
    assert shared.num_prompts == len(own)
    assert shared.num_stops == alone.num_stops
    assert shared.num_tokens < 0.7 * alone.num_tokens
    assert open_prepared(shared.folder, seq_len=160, buckets=rows.get("buckets", [])) == shared


def test_records_of_all_kinds_stand_side_by_side(
    apart: PreparedData, source: Path, data_config: Config, tmp_path: Path
) -> None:
    config = data_config(source, seq_len=160, buckets=[40, 160])
    assert sequences(prepare_into(config, tmp_path / "shared")) == sequences(apart)


def test_parquet_holds_the_same(apart: PreparedData, data_config: Config, tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    for kind, name in (("prompt", "texts"), ("messages", "chats")):
        rows = [record for record in records() if kind in record]
        if kind == "messages":  # a column has one type
            rows = [{**r, "responses": [x if isinstance(x, list) else [x] for x in r["responses"][-2:]]} for r in rows]
        folder, found = tmp_path / name, []
        folder.mkdir()
        (folder / "rows.json").write_text(module.json.dumps(rows))
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "rows.parquet")
        for file in ("rows.json", "rows.parquet"):
            config = data_config(folder / file, seq_len=160, tokenizer=str(apart.folder))
            found.append(sequences(prepare_into(config, folder / f"of_{file}")))
        assert found[0] == found[1] != []


def test_responses_that_no_row_holds_together_go_to_several(
    write_jsonl: WriteJsonl, data_config: Config, tmp_path: Path
) -> None:
    path = write_jsonl([{"prompt": "the river turns", "responses": [f" a wheel {n}" for n in range(12)]}])
    whole = prepare_into(data_config(path, seq_len=400), tmp_path / "whole")
    split = prepare_into(data_config(path, seq_len=24, tokenizer=str(whole.folder)), tmp_path / "split")
    assert sequences(split) == sequences(whole)
    assert (whole.num_prompts, whole.num_rows) == (1, 1)
    assert split.num_prompts == split.num_rows > 2
    # The filling of rows in the middle is known as such.
    filled = sum(len(ids) for ids, flags in documents(split) if flags[0] & PADDING)
    assert 0 < filled <= split.num_rows * 25 - split.num_tokens


@pytest.mark.parametrize("stop_at", [2, 9])
def test_interrupted_it_goes_on_to_the_same_bytes(
    source: Path, data_config: Config, tmp_path: Path, interrupt: Callable[..., None], stop_at: int
) -> None:
    config = data_config(source, seq_len=160)
    whole = prepare_into(config, tmp_path / "whole")
    interrupt(config, tmp_path / "out", stop_at=stop_at, batch_bytes=100)
    again = prepare_into(config, tmp_path / "out")
    assert again.digest == whole.digest
    assert (again.num_prompts, again.num_responses) == (whole.num_prompts, whole.num_responses)


def batches_of(data: PreparedData) -> list[TokenBatch]:
    found = []
    for array in data.arrays:
        if array.num_rows:
            found.append(to_batch(np.load(array.tokens_path), np.load(array.flags_path)))
    return found


def test_the_loss_is_that_of_every_response_alone(
    apart: PreparedData, source: Path, data_config: Config, tmp_path: Path
) -> None:
    shared = prepare_into(data_config(source, seq_len=160, buckets=[40, 160]), tmp_path / "shared")
    model = Decoder(
        replace(LLAMA, vocab_size=shared.vocab_size, num_layers=2, num_heads=2, num_kv_heads=1, intermediate_size=16),
        dtype=torch.float64,
    )
    torch.manual_seed(0)
    for param in model.parameters():
        torch.nn.init.normal_(param, std=0.3)
    totals = []
    for data in (shared, apart):
        batches = batches_of(data)
        with torch.no_grad():
            losses = [model(b.tokens, b.targets, packing=b.packing) for b in batches]
        totals.append((float(sum(losses)), sum(batch.num_targets for batch in batches)))
        parents = [parent for batch in batches for parent in batch.packing.parents if parent is not None]
        assert bool(parents) is (data is shared)
    assert totals[0][0] == pytest.approx(totals[1][0], rel=1e-13)
    assert totals[0][1] == totals[1][1]


@pytest.mark.parametrize("buckets", [[], [40, 160]])
def test_both_loaders_give_the_parents(source: Path, data_config: Config, tmp_path: Path, buckets: list[int]) -> None:
    data = prepare_into(data_config(source, seq_len=160, buckets=buckets), tmp_path / "rows")
    found = []
    for kind in Loader:
        config = DataConfig(name="t", prepared=str(data.folder), seq_len=160, buckets=buckets, loader=kind)
        loader = open_loader(config, train=TrainConfig(batch_size=2, micro_batches=2), rank=0, world_size=1)
        found.append([batch.packing for step in (0, 3, 1) for batch in loader.step_batches(step)])
        loader.close()
    assert [(p.lengths, p.parents) for p in found[0]] == [(p.lengths, p.parents) for p in found[1]]
    assert any(packing.parents for packing in found[0])


TURN = {"role": "assistant", "content": "x"}


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"responses": ["a"]}, "none of `text`.*or `prompt` and `responses`"),
        ({"prompt": "a", "messages": [TURN], "responses": ["a"]}, "one of `prompt` and `messages`, got prompt and mes"),
        ({"prompt": None, "responses": ["a"]}, "one of `prompt` and `messages`, got none"),
        ({"prompt": "a", "responses": []}, "line 1: `responses` must be a non-empty list, got an empty list"),
        ({"prompt": "a", "responses": ["b", 3]}, "response 1: `prompt` is a text, so a string is wanted, got a number"),
        ({"messages": "a", "responses": ["b"]}, "`messages` must be a non-empty list, got a string"),
        ({"messages": [TURN], "responses": [[]]}, "response 0: `messages` must be a non-empty list"),
        (
            {"messages": [TURN], "responses": [{"role": "user", "content": "x"}]},
            "response 0: none of its tokens counts",
        ),
        ({"prompt": "a", "responses": ["b"], "weights": [1.0]}, "`weights` of responses are not supported"),
        ({"prompt": "a " * 30, "responses": ["b", "c"]}, "the prompt and response 0 have .*data.share_prompts=false"),
    ],
)
def test_what_is_wrong_is_named(
    write_jsonl: WriteJsonl, data_config: Config, tmp_path: Path, record: Any, words: str
) -> None:
    path = write_jsonl([record, {"text": "the river turns a wheel"}])
    with pytest.raises(InputError, match=words, check=has_id(ErrorId.data_wrong)):
        prepare_into(data_config(path, seq_len=16), tmp_path / "rows")


def test_a_chat_may_have_no_responses(write_jsonl: WriteJsonl, data_config: Config, tmp_path: Path) -> None:
    chat = {"messages": [{"role": "user", "content": "x"}, TURN], "responses": None}
    data = prepare_into(data_config(write_jsonl([chat]), seq_len=16), tmp_path / "rows")
    assert (data.num_documents, data.num_responses) == (1, 0)
