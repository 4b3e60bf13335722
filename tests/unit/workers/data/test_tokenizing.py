"""Tokenizers: trained and given, special tokens, loss masks; transformers is the oracle."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from headrace.helpers.tiers import has_id
from headrace.storage.core.errors import ErrorId, InputError
from headrace.workers.data.config import DataConfig
from headrace.workers.data.readers import Piece
from headrace.workers.data.rows import STARTS, TARGET
from headrace.workers.data.sources import find_source
from headrace.workers.data.tokenizer_files import TokenizerFiles, read_tokenizer_files
from headrace.workers.data.tokenizing import RowTokenizer, train_bpe

Config = Callable[..., DataConfig]
TEXT = "The mill grinds. Die Mühle mahlt. 水车转动。 <|endoftext|> 😀\n\tindent\r\n"
CHAT = [{"role": "user", "content": "grind?"}, {"role": "assistant", "content": "ja, Mühle <3"}]
GENERATION = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "<|endoftext|>{% endgeneration %}{% else %}{{ m.content }}{% endif %}{{ '\n' }}{% endfor %}"
)


def piece(content: Any, *, starts: bool = True, ends: bool = True) -> Piece:
    return Piece(content, starts, ends, None, "here")


@pytest.fixture
def trained(tmp_path: Path, data_config: Config) -> TokenizerFiles:
    path = tmp_path / "source.txt"
    path.write_text(TEXT * 20)
    return train_bpe(find_source(data_config(path)), 300)


def test_trained_bpe_gives_any_text_back(trained: TokenizerFiles) -> None:
    tokenizer = RowTokenizer(trained)
    raw = Tokenizer.from_str(trained.contents["tokenizer.json"].decode())
    for text in (TEXT, "never seen: ζ \x00 \U0001f9ff", "a"):
        (encoded,) = tokenizer.encode([piece(text)])
        assert raw.decode(encoded.ids[:-1].tolist(), skip_special_tokens=False) == text
        assert encoded.ids[-1] == tokenizer.end_id
        assert (encoded.ids < tokenizer.vocab_size).all()
        assert encoded.flags.tolist() == [STARTS | TARGET] + [TARGET] * (len(encoded.ids) - 1)
    assert 257 < tokenizer.vocab_size <= 300


def test_training_twice_gives_the_same_bytes(trained: TokenizerFiles, tmp_path: Path, data_config: Config) -> None:
    again = train_bpe(find_source(data_config(tmp_path / "source.txt")), 300)
    assert again.contents == trained.contents
    assert again.identity == trained.identity


def test_a_document_cannot_forge_its_end(trained: TokenizerFiles) -> None:
    tokenizer = RowTokenizer(trained)
    (encoded,) = tokenizer.encode([piece("a <|endoftext|> b")])
    assert (encoded.ids == tokenizer.end_id).sum() == 1


def test_pieces_of_a_document_get_one_start_and_one_end(trained: TokenizerFiles) -> None:
    tokenizer = RowTokenizer(trained)
    parts = tokenizer.encode(
        [piece("ab\n", ends=False), piece("cd\n", starts=False, ends=False), piece("e", starts=False)]
    )
    assert [int((part.flags & STARTS).sum()) for part in parts] == [1, 0, 0]
    assert [int((part.ids == tokenizer.end_id).sum()) for part in parts] == [0, 0, 1]


def test_a_folder_of_transformers_is_read_as_transformers_reads_it(trained: TokenizerFiles, tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path / "hf"
    folder.mkdir()
    trained.save(folder)
    theirs = PreTrainedTokenizerFast.from_pretrained(folder)
    theirs.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    theirs.chat_template = GENERATION
    theirs.save_pretrained(folder)
    ours = RowTokenizer(read_tokenizer_files(folder))
    assert ours.vocab_size == len(theirs)
    assert ours.end_id == theirs.eos_token_id
    text = TEXT.replace("<|endoftext|>", "")
    text_piece, chat_piece = ours.encode([piece(text), piece(CHAT)])
    assert text_piece.ids[:-1].tolist() == theirs(text, add_special_tokens=False)["input_ids"]
    expected = theirs.apply_chat_template(
        CHAT, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, add_special_tokens=False
    )
    num = len(expected["input_ids"])
    assert chat_piece.ids[:num].tolist() == expected["input_ids"]
    assert chat_piece.ids[num:].tolist() == [ours.end_id]  # the template ends in a line end
    assert ((chat_piece.flags & TARGET) != 0).astype(int).tolist() == [*expected["assistant_masks"], 0]


def test_default_chat_template_counts_the_assistant_only(trained: TokenizerFiles) -> None:
    tokenizer = RowTokenizer(trained)
    raw = Tokenizer.from_str(trained.contents["tokenizer.json"].decode())
    mixed = tokenizer.encode([piece("text"), piece(CHAT), piece("more")])
    assert [int(part.ids[-1]) for part in mixed] == [tokenizer.end_id] * 3
    chat = mixed[1]
    targets = chat.ids[(chat.flags & TARGET) != 0].tolist()
    assert raw.decode(targets, skip_special_tokens=False) == "ja, Mühle <3<|endoftext|>"
    assert (chat.ids == tokenizer.end_id).sum() == 1


def given_tokenizer(**config: Any) -> TokenizerFiles:
    """A word-level tokenizer that puts <s> before everything, as Llama's does, and truncates (which must not count)."""
    tokenizer = Tokenizer(
        models.WordLevel({"<s>": 0, "</s>": 1, "<unk>": 2, "a": 3, "b": 4, "far": 70_000}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=50)
    contents = {"tokenizer.json": tokenizer.to_str().encode()}
    if config:
        contents["tokenizer_config.json"] = json.dumps(config).encode()
    return TokenizerFiles("given.json", contents)


def test_documents_begin_as_the_tokenizer_begins_them() -> None:
    tokenizer = RowTokenizer(given_tokenizer())
    assert tokenizer.vocab_size == 70_001
    (encoded,) = tokenizer.encode([piece("a b a b far")])
    assert encoded.ids.tolist() == [0, 3, 4, 3, 4, 70_000, 1]
    with_template = RowTokenizer(given_tokenizer(bos_token="<s>", eos_token="</s>", chat_template=BOS_CHAT))
    (chat,) = with_template.encode([piece([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])])
    assert chat.ids.tolist() == [0, 3, 4, 1]
    assert chat.flags.tolist() == [STARTS, 0, TARGET, TARGET]


BOS_CHAT = (
    "{{ bos_token }}{% for m in messages %}{{ m.content }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% else %}{{ ' ' }}{% endif %}{% endfor %}"
)


def test_named_chat_templates_and_token_objects() -> None:
    templates = [{"name": "tool_use", "template": "{% broken"}, {"name": "default", "template": BOS_CHAT}]
    files = given_tokenizer(eos_token={"content": "b", "lstrip": False}, chat_template=templates, bos_token="<s>")
    tokenizer = RowTokenizer(files)
    assert tokenizer.end_id == 4
    (chat,) = tokenizer.encode([piece([{"role": "user", "content": "a"}])])
    assert chat.ids.tolist() == [0, 3, 4]
    assert chat.flags.tolist() == [STARTS, 0, 0]


WRONG: dict[str, dict[str, bytes]] = {
    "bytes": {"tokenizer.json": b"\x00\x01"},
    "an empty object": {"tokenizer.json": b"{}"},
    "cut short": {"tokenizer.json": b'{"model": {"type": "BPE"'},
    "config cut short": {"tokenizer_config.json": b"{"},
    "config is a list": {"tokenizer_config.json": b"[]"},
    "eos is not there": {"tokenizer_config.json": b'{"eos_token": "<end>"}'},
    "eos of the map is not there": {"special_tokens_map.json": b'{"eos_token": "<end>"}'},
    "eos id is text": {"generation_config.json": b'{"eos_token_id": "1"}'},
    "eos id is not there": {"generation_config.json": b'{"eos_token_id": [9]}'},
    "a template is a number": {"tokenizer_config.json": b'{"chat_template": 5}'},
    "templates without names": {"tokenizer_config.json": b'{"chat_template": [{"template": "x"}]}'},
    "a template is not UTF-8": {"chat_template.jinja": b"\xff"},
    "added tokens are a list": {"tokenizer_config.json": b'{"added_tokens_decoder": []}'},
    "an added token has no text": {"tokenizer_config.json": b'{"added_tokens_decoder": {"5": {"special": true}}}'},
    "an added token is special by text": {
        "tokenizer_config.json": b'{"added_tokens_decoder": {"5": {"content": "x", "special": "yes"}}}'
    },
    "an added token lies elsewhere": {"added_tokens.json": b'{"x": 7}'},
    "an added token is a number": {"added_tokens.json": b'{"x": "y"}'},
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_tokenizer_is_named(case: str) -> None:
    given = given_tokenizer().contents
    files = TokenizerFiles("my/tokenizer.json", {**given, **WRONG[case]})
    with pytest.raises(InputError, match=r"my/tokenizer\.json", check=has_id(ErrorId.tokenizer_wrong)):
        RowTokenizer(files).encode([piece(CHAT)])


@pytest.mark.parametrize("vocabulary", [{"a": 0, "b": 1}, {"a": 0, "</s>": 1, "<|im_end|>": 2}])
def test_an_end_that_nobody_names_is_not_guessed(vocabulary: dict[str, int]) -> None:
    bare = Tokenizer(models.WordLevel(vocabulary, unk_token="a"))
    contents = {"tokenizer.json": bare.to_str().encode()}
    with pytest.raises(InputError, match=r"eos_token", check=has_id(ErrorId.tokenizer_wrong)):
        RowTokenizer(TokenizerFiles("bare.json", contents))
    contents["generation_config.json"] = b'{"eos_token_id": [1, 0]}'
    assert RowTokenizer(TokenizerFiles("bare.json", contents)).end_id == 1


def test_missing_tokenizer_and_tiny_vocabulary_are_named(tmp_path: Path, data_config: Config) -> None:
    for path in (tmp_path, tmp_path / "none.json"):
        with pytest.raises(InputError, match=r"data.tokenizer=", check=has_id(ErrorId.tokenizer_wrong)):
            read_tokenizer_files(path)
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(InputError, match=r"bpe_vocab_size=256: at least 257"):
        train_bpe(find_source(data_config(tmp_path / "a.txt")), 256)
