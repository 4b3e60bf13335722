"""Which tokens of a chat are targets, and that something always teaches the model to stop."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from headrace.helpers.tiers import has_id
from headrace.platform.cli.main import main
from headrace.storage.core.errors import ErrorId, InputError
from headrace.workers.data.config import DataConfig
from headrace.workers.data.prepare import prepare_into
from headrace.workers.data.readers import Cursor, Piece, ReadTally, read_pieces
from headrace.workers.data.rows import TARGET
from headrace.workers.data.sources import find_source
from headrace.workers.data.tokenizer_files import TokenizerFiles
from headrace.workers.data.tokenizing import RowTokenizer

Config = Callable[..., DataConfig]
WriteJsonl = Callable[..., Path]
END = "<|endoftext|>"
ASK, SAY = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
BARE = "{% for m in messages %}{{ 'Q: ' if m.role == 'user' else 'A: ' }}{{ m.content }}\n{% endfor %}"
BLOCK = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
)


def tokenizer_files(template: str, *, special: bool = False, **config: Any) -> TokenizerFiles:
    """Bytes, and three added tokens of which only the end of text is surely flagged special."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={text: i for i, text in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END])
    tokenizer.add_tokens([AddedToken(t, special=special, normalized=False) for t in ("<|im_start|>", "<|im_end|>")])
    values = {"eos_token": END, "chat_template": template, **config}
    contents = {"tokenizer.json": tokenizer.to_str(), "tokenizer_config.json": json.dumps(values)}
    return TokenizerFiles("t/tokenizer.json", {name: text.encode() for name, text in contents.items()})


def targets(files: TokenizerFiles, chat: list[dict[str, Any]]) -> tuple[str, bool]:
    """The targets as one text, what lies between them as `~`; and whether something stops the model."""
    (encoded,) = RowTokenizer(files).encode([Piece(chat, True, True, None, "here")])
    raw = Tokenizer.from_str(files.contents["tokenizer.json"].decode())
    pairs = zip(encoded.ids.tolist(), (encoded.flags & TARGET) != 0, strict=True)
    text = "".join(raw.decode([number], skip_special_tokens=False) if is_target else "~" for number, is_target in pairs)
    while "~~" in text:
        text = text.replace("~~", "~")
    return text.strip("~"), encoded.stops


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize(
    ("template", "config", "chat", "wanted", "stops"),
    [
        # The turn closes with a token that generation stops at.
        (CHATML + PROMPT, {"eos_token": "<|im_end|>"}, [ASK, SAY], "b<|im_end|>", True),
        (CHATML + PROMPT, {"eos_token": "<|im_end|>"}, [ASK, SAY, ASK, SAY], "b<|im_end|>~b<|im_end|>", True),
        # It closes with another one: generation goes on, to the end of the document.
        (CHATML + PROMPT, {}, [ASK, SAY], f"b<|im_end|>\n{END}", True),
        (CHATML + PROMPT, {}, [ASK, SAY, ASK, SAY], f"b<|im_end|>~b<|im_end|>\n{END}", True),
        (CHATML + PROMPT, {}, [ASK, SAY, ASK], "b<|im_end|>", True),
        (CHATML + PROMPT, {}, [ASK, {"role": "assistant", "content": ""}], f"<|im_end|>\n{END}", True),
        (CHATML + PROMPT, {}, [ASK, SAY, SAY], f"b<|im_end|>~b<|im_end|>\n{END}", True),
        # Nothing closes a turn.
        (BARE, {}, [ASK, SAY], f"A: b\n{END}", True),
        (BARE + "{% if add_generation_prompt %}A: {% endif %}", {}, [ASK, SAY], f"b\n{END}", True),
        (BARE, {}, [ASK, SAY, ASK], "A: b\n", False),
        # The template writes the next header at every end: nothing may be taught there.
        (BARE + "A: ", {}, [ASK, SAY], "b\n", False),
        # It closes the chat behind the loop.
        (BARE + "{{ eos_token }}", {}, [ASK, SAY], f"A: b\n{END}", True),
        # Its own blocks leave the closing token out.
        (BLOCK, {"eos_token": "<|im_end|>"}, [ASK, SAY], "b<|im_end|>", True),
        (BLOCK, {}, [ASK, SAY, ASK, SAY], f"b~b<|im_end|>\n{END}", True),
        (BLOCK, {}, [ASK, SAY, ASK], "b", False),
    ],
)
def test_something_stops_the_assistant(
    template: str, config: dict[str, str], chat: list[dict[str, Any]], wanted: str, stops: bool, special: bool
) -> None:
    assert targets(tokenizer_files(template, special=special, **config), chat) == (wanted, stops)


def test_a_header_that_the_turn_says_in_part() -> None:
    """As DeepSeek-R1's: the generation prompt goes on with a tag that earlier turns do not have."""
    template = CHATML + "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
    text, _ = targets(tokenizer_files(template, eos_token="<|im_end|>"), [ASK, {**SAY, "content": "<b>"}])
    assert text == "<b><|im_end|>"


def test_chats_that_teach_no_stop_are_refused(
    tmp_path: Path, data_config: Config, write_jsonl: WriteJsonl, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer_files(BARE).save(tmp_path)
    source, out = write_jsonl([{"messages": [ASK, SAY, ASK]}] * 9), tmp_path / "out"
    config = data_config(source, tokenizer=str(tmp_path))
    with pytest.raises(InputError, check=has_id(ErrorId.data_without_stop)):
        prepare_into(config, out)
    words = ["data", "prepare", f"source={source}", f"out={out}", f"tokenizer={tmp_path}", "seq_len=16"]
    assert main(words) == 2
    assert "data.allow_no_stop" in capsys.readouterr().err
    assert sorted(tmp_path.glob("out*")) == []
    assert main([*words, "allow_no_stop=true"]) == 0
    assert "num stops            0" in capsys.readouterr().out
    assert main(words) == 2  # the folder is there now
    write_jsonl([{"messages": [ASK, SAY, ASK]}, {"messages": [ASK, SAY]}])
    assert prepare_into(config, tmp_path / "mixed").num_stops == 1
    write_jsonl([{"text": "a"}, {"text": "b"}])
    assert prepare_into(config, tmp_path / "text").num_stops == 2


def test_the_day_that_a_template_is_told_is_recorded(
    tmp_path: Path, data_config: Config, write_jsonl: WriteJsonl
) -> None:
    source = write_jsonl([{"messages": [ASK, SAY]}] * 2)
    for name, template, wanted in (
        ("dated", "{{ strftime_now('%d %b %Y') }}" + CHATML, "2024-07-26"),
        ("no", CHATML, ""),
    ):
        tokenizer_files(template).save(tmp_path)
        config = data_config(source, tokenizer=str(tmp_path))
        if wanted:
            with pytest.warns(UserWarning, match="26 Jul 2024"):
                data = prepare_into(config, tmp_path / name)
        else:
            data = prepare_into(config, tmp_path / name)
        assert data.chat_date == wanted


CALLS = [
    [{"id": "1", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}],
    [{"type": "function", "function": {"name": "ask", "arguments": {"question": "why", "to": {"name": "x"}}}}],
]
TOOLS = [
    {"type": "function", "function": {"name": "add", "parameters": {"a": {"type": "number"}}}},
    {"type": "function", "function": {"name": "ask", "parameters": {"question": {"type": "string"}}, "strict": True}},
]
RECORDS: list[dict[str, Any]] = [
    {
        "messages": [
            ASK,
            {"role": "assistant", "tool_calls": CALLS[0]},
            {"role": "tool", "content": "1", "id": "1"},
            SAY,
        ],
        "tools": TOOLS,
    },
    {
        "messages": [ASK, {"role": "assistant", "content": "c", "tool_calls": CALLS[1]}],
        "documents": [{"title": "t", "text": "u"}, {"title": "v"}],
        "chat_template_kwargs": {"mood": "glad"},
    },
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}, {**SAY, "name": "n"}]},
    {"messages": [ASK, SAY]},
]
SEES_ALL = (
    "{{ tools is none }}{{ documents is none }}{{ mood is defined }}{{ messages | tojson }}{{ tools | tojson }}"
    "{{ documents | tojson }}{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
)


@pytest.mark.parametrize("as_text", [False, True])
def test_parquet_gives_a_template_what_json_lines_give(
    tmp_path: Path, data_config: Config, write_jsonl: WriteJsonl, as_text: bool
) -> None:
    """No null that only the column's type puts there; tools and documents also as JSON text."""
    from transformers import PreTrainedTokenizerFast

    records = [*RECORDS[:2], RECORDS[3]]  # a column of Parquet has one type of content
    columns = {
        key: [
            json.dumps(record[key]) if as_text and key != "messages" and key in record else record.get(key)
            for record in records
        ]
        for key in ("messages", "tools", "documents", "chat_template_kwargs")
    }
    pq.write_table(pa.table(columns), tmp_path / "chats.parquet")
    files = tokenizer_files(SEES_ALL)
    files.save(tmp_path)
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    tokenizer = RowTokenizer(files)
    for source, wanted in ((tmp_path / "chats.parquet", records), (write_jsonl(RECORDS), RECORDS)):
        pieces = read_pieces(find_source(data_config(source)), start=Cursor(), tally=ReadTally(), max_bytes=None)
        for encoded, record in zip(tokenizer.encode([*pieces]), wanted, strict=True):
            given = {key: record.get(key) for key in ("tools", "documents")} | record.get("chat_template_kwargs", {})
            expected = theirs.apply_chat_template(record["messages"], tokenize=True, **given)["input_ids"]
            assert theirs.decode(encoded.ids[:-1]) == theirs.decode(expected)
            assert encoded.ids[:-1].tolist() == expected
