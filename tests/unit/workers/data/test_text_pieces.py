"""A text that is tokenized in pieces has the tokens of the whole."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from headrace.storage.core.errors import InputError
from headrace.workers.data import readers
from headrace.workers.data.config import DataConfig
from headrace.workers.data.readers import Cursor, ReadTally, read_pieces
from headrace.workers.data.rows import STARTS
from headrace.workers.data.sources import find_source
from headrace.workers.data.tokenizer_files import TokenizerFiles
from headrace.workers.data.tokenizing import RowTokenizer

CORPUS = [
    "the mill grinds  and grinds.\n\nDie Mühle mahlt: 水车转动 😀\n\tindent = 12345\r\n  two  spaces \r\n",
    "a\nb\n\nc <|end|> don't we'll (x.y) a\u00a0b\n   \n",
] * 3
END = "<|end|>"
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)


def byte_level(**options: Any) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(**options)
    tokenizer.decoder = decoders.ByteLevel()
    return trained(tokenizer, trainers.BpeTrainer, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())


def llama3_like() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return trained(tokenizer, trainers.BpeTrainer, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())


def llama2_like() -> Tokenizer:
    """No pre-tokenizer: a normalizer puts a space before every text."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    specials = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    return trained(tokenizer, trainers.BpeTrainer, special_tokens=specials)


def unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    return trained(tokenizer, trainers.UnigramTrainer, special_tokens=["<unk>"], unk_token="<unk>")


def word_piece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return trained(tokenizer, trainers.WordPieceTrainer, special_tokens=["[UNK]"])


def trained(tokenizer: Tokenizer, trainer: Callable[..., Any], **options: Any) -> Tokenizer:
    tokenizer.train_from_iterator(CORPUS, trainer(vocab_size=420, show_progress=False, **options))
    tokenizer.add_special_tokens([END])
    return tokenizer


def rows_of(tokenizer: Tokenizer) -> RowTokenizer:
    contents = {"tokenizer.json": tokenizer.to_str(), "tokenizer_config.json": json.dumps({"eos_token": END})}
    return RowTokenizer(TokenizerFiles("t", {name: text.encode() for name, text in contents.items()}))


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte-level": lambda: byte_level(add_prefix_space=False),
    "byte-level with a prefix space": lambda: byte_level(add_prefix_space=True),
    "as Llama 3": llama3_like,
    "as Llama 2": llama2_like,
    "unigram": unigram,
    "WordPiece": word_piece,
}
TEXTS = st.lists(
    st.sampled_from(
        ["the", " mill", "grinds", " ", "  ", "\n", "\n\n", "\r\n", "\t", "水车", "é", "😀", ".", "12", END]
    ),
    max_size=150,
).map("".join)


@pytest.fixture(scope="module", params=KINDS, ids=lambda name: name.replace(" ", "-"))
def tokenizers(request: pytest.FixtureRequest) -> tuple[RowTokenizer, Tokenizer]:
    tokenizer = KINDS[request.param]()
    return rows_of(tokenizer), tokenizer


def ids_in_pieces(rows: RowTokenizer, path: Path) -> list[int]:
    source = find_source(DataConfig(name="t", source=str(path)))
    pieces = [*read_pieces(source, start=Cursor(), tally=ReadTally(), max_bytes=None)]
    parts = rows.encode(pieces)
    if readers.CONTEXT:
        starts = [bool(flag & STARTS) for part in parts for flag in part.flags.tolist()]
        assert starts == [True, *(False for _ in starts[1:])]
    return [number for part in parts for number in part.ids.tolist()]


def check_pieces(
    tokenizers: tuple[RowTokenizer, Tokenizer],
    folder: Path,
    text: str,
    piece_bytes: int,
    as_record: bool,
    *,
    context: int,
) -> None:
    """Pieces of a file have the tokens of its whole text."""
    rows, tokenizer = tokenizers
    path = folder / f"pieces{'.jsonl' if as_record else '.txt'}"
    path.write_bytes((json.dumps({"text": text}) if as_record else text).encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "PIECE_BYTES", piece_bytes)
        patch.setattr(readers.split_text, "__defaults__", (piece_bytes,))
        patch.setattr(readers, "CONTEXT", context)
        ids = ids_in_pieces(rows, path) if text else [rows.end_id]
    tokenizer.encode_special_tokens = True
    assert ids == [*tokenizer.encode(text, add_special_tokens=False).ids, rows.end_id]


@settings(max_examples=60, deadline=None)
@given(text=TEXTS, piece_bytes=st.integers(5, 60), as_record=st.booleans())
@example(text="the mill\n\n  grinds  \n\n\nthe \r\n\r\n mill" * 9, piece_bytes=11, as_record=False)
@example(text="the mill grinds. " * 30, piece_bytes=8, as_record=True)
def test_pieces_have_the_tokens_of_the_whole(
    tokenizers: tuple[RowTokenizer, Tokenizer],
    tmp_path_factory: pytest.TempPathFactory,
    text: str,
    piece_bytes: int,
    as_record: bool,
) -> None:
    check_pieces(tokenizers, tmp_path_factory.getbasetemp(), text, piece_bytes, as_record, context=120)


LONG = [
    "the" * 90,
    "mill" * 70 + ".",
    " " * 300,
    "\n" * 200,
    "水车" * 150,
    "12" * 130,
    "." * 280,
    "(x)" * 80,
    "é" * 200,
]


@settings(max_examples=40, deadline=None)
@given(
    text=st.lists(st.sampled_from([*LONG, "the", " mill", " ", "\n", ".", "水车", " "]), min_size=2, max_size=14).map(
        "".join
    ),
    piece_bytes=st.integers(20, 400),
    as_record=st.booleans(),
)
@example(text=" " * 300 + "the mill", piece_bytes=20, as_record=True)
@example(text="the mill " + "themill" * 150 + " grinds", piece_bytes=60, as_record=True)
@example(text="the mill " + "themill" * 150 + " grinds", piece_bytes=60, as_record=False)
def test_pieces_that_cut_a_word_longer_than_the_context(
    tokenizers: tuple[RowTokenizer, Tokenizer],
    tmp_path_factory: pytest.TempPathFactory,
    text: str,
    piece_bytes: int,
    as_record: bool,
) -> None:
    check_pieces(tokenizers, tmp_path_factory.getbasetemp(), text, piece_bytes, as_record, context=40)


@pytest.mark.parametrize("as_record", [True, False])
def test_a_word_too_long_for_any_context_is_refused(
    as_record: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, size in {"PIECE_BYTES": 1 << 10, "CONTEXT": 1 << 8, "MAX_CONTEXT": 1 << 12}.items():
        monkeypatch.setattr(readers, name, size)
    monkeypatch.setattr(readers.split_text, "__defaults__", (1 << 10,))
    rows = rows_of(byte_level(add_prefix_space=False))
    path = tmp_path / f"word{'.jsonl' if as_record else '.txt'}"
    for length, fits in [(4000, True), (12000, False)]:
        text = "the mill " * 200 + "ab" * (length // 2) + " grinds" * 300
        path.write_text(json.dumps({"text": text}) if as_record else text)
        if fits:
            assert ids_in_pieces(rows, path)
            continue
        with pytest.raises(InputError, match=r"word\..*white space.*put spaces"):
            ids_in_pieces(rows, path)


def test_mutant_without_context_a_space_is_put_before_every_piece(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = rows_of(llama2_like())
    (tmp_path / "a.txt").write_text("the mill\ngrinds\n" * 20)
    whole = ids_in_pieces(rows, tmp_path / "a.txt")
    monkeypatch.setattr(readers, "PIECE_BYTES", 16)
    assert ids_in_pieces(rows, tmp_path / "a.txt") == whole
    for name in ("CONTEXT", "BREAKS"):
        monkeypatch.setattr(readers, name, 0)
    assert ids_in_pieces(rows, tmp_path / "a.txt") != whole


@pytest.mark.parametrize(
    ("single", "begin"), [("<s> $A", [True]), ("$A </s>", []), ("</s> $A", []), ("<s> $A </s>", [True]), ("$A", [])]
)
def test_begin_tokens_are_no_end_tokens(single: str, begin: list[bool]) -> None:
    """An end token that a post-processor writes, before or behind, must not stand before every document."""
    tokenizer = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "a": 2}, unk_token="a"))
    tokenizer.add_special_tokens(["<s>", "</s>"])
    special = [("<s>", 0), ("</s>", 1)]
    tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)
    contents = {"tokenizer.json": tokenizer.to_str(), "tokenizer_config.json": '{"eos_token": "</s>"}'}
    rows = RowTokenizer(TokenizerFiles("t", {name: text.encode() for name, text in contents.items()}))
    assert rows.begin_ids == [0 for _ in begin]
