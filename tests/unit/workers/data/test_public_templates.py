"""Chats through the templates of public models: text, ids and targets are those of transformers.

The oracle of the targets is transformers' own mask: a variant of each template, which differs in `{% generation %}`
blocks only, renders the same text.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from headrace.helpers.tiers import has_id
from headrace.storage.core.errors import ErrorId, InputError
from headrace.workers.data.config import DataConfig
from headrace.workers.data.readers import Cursor, Piece, ReadTally, read_pieces
from headrace.workers.data.rows import STARTS, TARGET
from headrace.workers.data.sources import find_source
from headrace.workers.data.tokenizer_files import TokenizerFiles
from headrace.workers.data.tokenizing import RowTokenizer

TEMPLATES = Path(__file__).with_name("chat_templates")
BEGIN, END = "{%- if message['role'] == 'assistant' %}{% generation %}", "{% endgeneration %}"
LLAMA3 = [
    (
        "{{ content }}",
        "{% if message['role'] == 'assistant' %}{% set parts = content.split('<|end_header_id|>\n\n', 1) %}"
        "{{ parts[0] }}<|end_header_id|>{{ '\n\n' }}{% generation %}{{ parts[1] }}{% endgeneration %}"
        "{% else %}{{ content }}{% endif %}",
    )
]
HEADER = "{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}"
QWEN_TURN = "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}"


@dataclass(frozen=True)
class Family:
    """A template: what makes it the variant with generation blocks, and the tokens of its model.

    Args:
        marks: (text of the template, text of the variant).
        plain: added tokens that are not flagged special.
        eos: of the tokenizer. stops: of generation_config.json.
        pieces: an SentencePiece-like tokenizer; byte-level BPE otherwise.
    """

    name: str
    marks: list[tuple[str, str]]
    special: tuple[str, ...]
    eos: str
    bos: str | None = None
    plain: tuple[str, ...] = ()
    stops: tuple[str, ...] = ()
    pieces: bool = False

    @property
    def template(self) -> str:
        return (TEMPLATES / f"{self.name}.jinja").read_text(encoding="utf-8")

    @property
    def marked(self) -> str:
        text = self.template
        for old, new in self.marks:
            assert old in text, f"{self.name}: no {old!r}"
            text = text.replace(old, new)
        return text


LLAMA_SPECIAL = (
    "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>",
    "<|python_tag|>",
)  # fmt: skip
QWEN_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
PHI_SPECIAL = ("<s>", "</s>", "<|endoftext|>", "<|assistant|>", "<|user|>", "<|system|>", "<|end|>")
MISTRAL_SPECIAL = (
    "<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]",
)  # fmt: skip
FAMILIES = [
    Family("llama3", LLAMA3, LLAMA_SPECIAL, "<|eot_id|>", "<|begin_of_text|>"),
    Family("llama3_first", LLAMA3, LLAMA_SPECIAL, "<|end_of_text|>", "<|begin_of_text|>"),
    Family(
        "llama3_1",
        [
            (
                "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim "
                "+ '<|eot_id|>' }}",
                "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}"
                "{%- if message.role == 'assistant' %}{% generation %}{{ message['content'] | trim + '<|eot_id|>' }}"
                "{% endgeneration %}{% else %}{{ message['content'] | trim + '<|eot_id|>' }}{% endif %}",
            ),
            ("            {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}\n", ""),
            (
                "{%- set tool_call = message.tool_calls[0].function %}",
                "{%- set tool_call = message.tool_calls[0].function %}" + HEADER + "{%- generation %}",
            ),
            (
                '{{- "<|eot_id|>" }}\n        {%- endif %}\n    {%- elif message.role == "tool"',
                '{{- "<|eot_id|>" }}\n        {%- endif %}{% endgeneration %}\n    {%- elif message.role == "tool"',
            ),
        ],
        LLAMA_SPECIAL,
        "<|eot_id|>",
        "<|begin_of_text|>",
        stops=("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"),
    ),
    Family(
        "qwen2_5",
        [
            (
                QWEN_TURN,
                "{{- '<|im_start|>' + message.role + '\\n' }}{%- if message.role == 'assistant' %}{% generation %}"
                "{{ message.content + '<|im_end|>' }}{% endgeneration %}{% else %}"
                "{{ message.content + '<|im_end|>' }}{% endif %}{{ '\\n' }}",
            ),
            (
                "{{- '<|im_start|>' + message.role }}",
                "{{- '<|im_start|>' + message.role + '\\n' }}{% generation %}{% set ns = namespace(sep='') %}",
            ),
            ("{{- '\\n' + message.content }}", "{{- message.content }}{% set ns.sep = '\\n' %}"),
            (
                '{{- \'\\n<tool_call>\\n{"name": "\' }}',
                "{{- ns.sep + '<tool_call>\\n{\"name\": \"' }}{% set ns.sep = '\\n' %}",
            ),
            (
                "{{- '<|im_end|>\\n' }}\n    {%- elif message.role == \"tool\"",
                "{{- '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}\n    {%- elif message.role == \"tool\"",
            ),
        ],
        QWEN_SPECIAL,
        "<|im_end|>",
        plain=("<tool_call>", "</tool_call>"),
        stops=("<|im_end|>", "<|endoftext|>"),
    ),
    Family(
        "qwen3",
        [
            (
                "{%- set reasoning_content = '' %}",
                "{{- '<|im_start|>' + message.role + '\\n' }}{% generation %}{%- set reasoning_content = '' %}",
            ),
            ("{{- '<|im_start|>' + message.role + '\\n<think>", "{{- '<think>"),
            ("{{- '<|im_start|>' + message.role + '\\n' + content }}", "{{- content }}"),
            (
                "{{- '<|im_end|>\\n' }}\n    {%- elif message.role == \"tool\"",
                "{{- '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}\n    {%- elif message.role == \"tool\"",
            ),
        ],
        QWEN_SPECIAL,
        "<|im_end|>",
        plain=("<tool_call>", "</tool_call>", "<think>", "</think>"),
    ),
    Family(
        "phi3",
        [
            (
                "{{'<|assistant|>\\n' + message['content'] + '<|end|>\\n'}}",
                "{{'<|assistant|>\\n'}}{% generation %}{{ message['content'] + '<|end|>' }}{% endgeneration %}"
                "{{ '\\n' }}",
            )
        ],
        PHI_SPECIAL,
        "<|endoftext|>",
        "<s>",
        stops=("<|endoftext|>", "<|assistant|>", "<|end|>"),
        pieces=True,
    ),
    Family(
        "phi3_first",
        [
            (
                "{{message['content'] + '<|end|>' + '\\n'}}",
                "{% generation %}{{ message['content'] + '<|end|>' }}{% endgeneration %}{{ '\\n' }}",
            )
        ],
        PHI_SPECIAL,
        "<|endoftext|>",
        "<s>",
        stops=("<|endoftext|>", "<|end|>"),
        pieces=True,
    ),
    Family(
        "mistral_v0_1",
        [
            (
                "{{ message['content'] + eos_token}}",
                "{% generation %}{{ message['content'] + eos_token}}{% endgeneration %}",
            )
        ],
        ("<s>", "</s>"),
        "</s>",
        "<s>",
        pieces=True,
    ),
    Family(
        "mistral_v0_3",
        [
            ('{{- "[TOOL_CALLS] [" }}', '{%- generation %}{{- "[TOOL_CALLS] [" }}'),
            (
                '{%- endfor %}\n    {%- elif message["role"] == "assistant" %}',
                '{%- endfor %}{% endgeneration %}\n    {%- elif message["role"] == "assistant" %}',
            ),
            (
                '{{- " " + message["content"]|trim + eos_token}}',
                '{%- generation %}{{- " " + message["content"]|trim + eos_token}}{% endgeneration %}',
            ),
        ],
        MISTRAL_SPECIAL,
        "</s>",
        "<s>",
        pieces=True,
    ),
]


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"type": "function", "id": "a1b2c3d4e", "function": {"name": name, "arguments": arguments}}


def user(text: Any) -> dict[str, Any]:
    return {"role": "user", "content": text}


def answer(text: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def result(text: str) -> dict[str, Any]:
    return {"role": "tool", "name": "add", "tool_call_id": "a1b2c3d4e", "content": text}


TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds <a> & 'b'.",
        "parameters": {"type": "object", "properties": {"a": {"type": "number"}, "b": {"type": ["number", "null"]}}},
    },
}
SUM = [user("What is 2 + 3?"), answer(None, tool_calls=[call("add", a=2, b=3)]), result("5"), answer("It is 5.")]
SYSTEM = {"role": "system", "content": "You grind grain.\n"}
PARTS = [{"type": "text", "text": "what is"}, {"type": "text", "text": " a mill?"}]
CHATS: dict[str, dict[str, Any]] = {
    "two turns": {"messages": [user("what?"), answer("A mill."), user("Why?"), answer(" It grinds \n")]},
    "system": {"messages": [SYSTEM, user("Mühle 水 😀?"), answer("ja, Mühle <b>水</b> 😀")]},
    "tool call in the middle": {"messages": SUM, "tools": [TOOL]},
    "words and a tool call": {
        "messages": [SYSTEM, user("2 + 3?"), answer("I add.", tool_calls=[call("add", a=2, b=None)]), *SUM[2:]],
        "tools": [TOOL],
    },
    "a tool call is the end": {"messages": SUM[:2], "tools": [TOOL, TOOL]},
    "two tool calls, two results": {
        "messages": [user("?"), answer("", tool_calls=[call("add", a=1), call("add", b="ä")]), result("1"), *SUM[2:]]
    },
    "empty turn": {"messages": [user("Say nothing."), answer(""), user("Good."), answer("")]},
    "null content": {"messages": [user("Say nothing."), answer(None)]},
    "text parts": {"messages": [user(PARTS), answer([{"type": "text", "text": "It grinds."}])]},
    "assistant twice": {"messages": [user("Go on."), answer("One."), answer("Two."), answer("Two.")]},
    "documents": {
        "messages": [user("What grinds?"), answer("A mill.")],
        "documents": [{"title": "mills", "text": "A mill grinds."}],
    },
    "template's own variables": {
        "messages": [SYSTEM, *SUM],
        "tools": [TOOL],
        "chat_template_kwargs": {
            "enable_thinking": False,
            "date_string": "1 Jan 2026",
            "tools_in_user_message": False,
            "builtin_tools": ["code_interpreter", "search"],
        },
    },
    "thoughts": {
        "messages": [user("?"), answer("<think>\na\n</think>\n\nb"), user("?"), answer("c", reasoning_content="d")]
    },
    "the user has the last word": {"messages": [user("what?"), answer("A mill."), user("I see.")]},
    "the assistant begins": {"messages": [answer("Welcome."), user("Hello."), answer("What is it?")]},
}


def files_of(family: Family) -> TokenizerFiles:
    """A small tokenizer of the family's kind, trained on its template and the chats."""
    corpus = [family.template, json.dumps(CHATS, ensure_ascii=False)]
    trainer_of: dict[str, Any] = {"vocab_size": 700, "show_progress": False}
    if family.pieces:
        tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        trainer_of["special_tokens"] = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    else:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer_of["initial_alphabet"] = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(corpus, trainers.BpeTrainer(**trainer_of))
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in family.special])
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in family.plain])
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": family.eos,
        **({"bos_token": family.bos} if family.bos else {}),
        "chat_template": family.template,
    }
    contents = {"tokenizer.json": tokenizer.to_str().encode(), "tokenizer_config.json": json.dumps(config).encode()}
    if family.stops:
        stops = [tokenizer.token_to_id(text) for text in family.stops]
        contents["generation_config.json"] = json.dumps({"eos_token_id": stops}).encode()
    return TokenizerFiles(f"{family.name}/tokenizer.json", contents)


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Piece]:
    """The chats as a JSONL file gives them."""
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    path.write_text("".join(json.dumps(chat) + "\n" for chat in CHATS.values()))
    source = find_source(DataConfig(name="chats", source=str(path)))
    read = read_pieces(source, start=Cursor(), tally=ReadTally(), max_bytes=None)
    return dict(zip(CHATS, read, strict=True))


@dataclass(frozen=True)
class Theirs:
    """What transformers makes of a chat; None where the template refuses it."""

    text: str
    ids: list[int]
    mask: list[int]


def of_transformers(tokenizer: Any, family: Family, chat: dict[str, Any]) -> Theirs | None:
    given = {"tools": chat.get("tools"), "documents": chat.get("documents"), **chat.get("chat_template_kwargs", {})}
    try:
        text = tokenizer.apply_chat_template(chat["messages"], tokenize=False, **given)
    except (jinja2.TemplateError, TypeError):
        return None
    marked = tokenizer.apply_chat_template(
        chat["messages"], chat_template=family.marked, return_assistant_tokens_mask=True, **given
    )
    ids = tokenizer.apply_chat_template(chat["messages"], **given)["input_ids"]
    assert marked["input_ids"] == ids, "the variant renders another text"
    return Theirs(text, ids, marked["assistant_masks"])


@pytest.fixture(scope="module")
def table() -> Iterator[dict[str, Counter[str]]]:
    """Counts by template, printed at the end."""
    counts: dict[str, Counter[str]] = {}
    yield counts
    columns = ("chats", "text, ids and targets equal", "refused by both", "target tokens")
    print("\n" + "".join(f"{name:<30}" for name in ("template", *columns)))
    for name, row in counts.items():
        print(f"{name:<30}" + "".join(f"{row[column]:<30}" for column in columns))


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_chats_are_those_of_transformers(
    family: Family, pieces: dict[str, Piece], table: dict[str, Counter[str]], tmp_path: Path
) -> None:
    from transformers import PreTrainedTokenizerFast

    files = files_of(family)
    files.save(tmp_path)
    theirs_of = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    ours_of, counts = RowTokenizer(files), table.setdefault(family.name, Counter())
    for name, chat in CHATS.items():
        counts["chats"] += 1
        theirs = of_transformers(theirs_of, family, chat)
        if theirs is None:
            with pytest.raises(InputError, check=has_id(ErrorId.chat_template_failed)):
                ours_of.encode([pieces[name]])
            counts["refused by both"] += 1
            continue
        (ours,) = ours_of.encode([pieces[name]])
        num = len(theirs.ids)
        assert ours.ids[:num].tolist() == theirs.ids, name
        assert theirs_of.decode(ours.ids[:num]) == theirs_of.decode(theirs.ids)
        assert ours.ids[num:].tolist() in ([], [ours_of.end_id])
        mask = ((ours.flags & TARGET) != 0).astype(int).tolist()
        check_targets(family, name, mask, theirs, theirs_of, ours_of)
        assert (ours.flags & STARTS).tolist() == [STARTS] + [0] * (len(ours.ids) - 1)
        assert ours.stops == (chat["messages"][-1]["role"] == "assistant" or any(theirs.mask))
        counts["text, ids and targets equal"] += 1
        counts["target tokens"] += sum(mask)
    assert counts["text, ids and targets equal"] >= 5


def check_targets(
    family: Family, name: str, mask: list[int], theirs: Theirs, tokenizer: Any, rows: RowTokenizer
) -> None:
    """Transformers' targets, and behind the last turn the way to a token that stops generation."""
    num = len(theirs.ids)
    last = max(i for i, is_target in enumerate(theirs.mask) if is_target)
    stops = {rows.end_id, *tokenizer.convert_tokens_to_ids(list(family.stops))}
    differing = [i for i in range(num) if mask[i] != theirs.mask[i]]
    shown = f"{family.name}, {name}: {theirs.text!r} {[tokenizer.decode(theirs.ids[i]) for i in differing]}"
    if CHATS[name]["messages"][-1]["role"] == "assistant" and theirs.ids[last] not in stops:
        assert family.name == "llama3_first", shown  # its end of text is no end of a turn
    assert mask[:num] == theirs.mask, shown
    assert not any(mask[num:]), shown
