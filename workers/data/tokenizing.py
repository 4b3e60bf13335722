"""Text to token ids: a Hugging Face tokenizer.json, or a byte-level BPE trained on the spot.

Every document ends in the end-of-document token. A text begins with the tokens that the tokenizer's own post-processor
puts before a text, if there are any (Llama's `<|begin_of_text|>`); a chat begins as its template does. In `text`
documents the names of special tokens are ordinary text; in chats, where a template writes them, they are the special
tokens.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from tokenizers import Encoding, Tokenizer, decoders, models, pre_tokenizers, trainers

from headrace.storage.core.errors import InputError
from headrace.workers.data.chat import DEFAULT_TEMPLATE, ChatTemplate, RenderedChat
from headrace.workers.data.chat_targets import ChatTokens, TurnEnds, chat_tokens
from headrace.workers.data.readers import Cursor, Piece, ReadTally, read_pieces
from headrace.workers.data.records import Messages, Responses, texts_of
from headrace.workers.data.rows import STARTS, TARGET
from headrace.workers.data.shared_prompts import Tokens, flagged, share_prompt
from headrace.workers.data.sources import Source
from headrace.workers.data.tokenizer_files import (
    CONFIG_FILE,
    GENERATION_FILE,
    TOKENIZER_FILE,
    TokenizerFiles,
    library_errors,
    open_tokenizer,
    wrong,
)

END_OF_DOCUMENT = "<|endoftext|>"
# What ends a document in tokenizers that come without a tokenizer_config.json.
_KNOWN_ENDS = (END_OF_DOCUMENT, "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "<|eot_id|>")
# The BPE is trained on this much text, spread over at most this many files: under a second on one core.
SAMPLE_BYTES, SAMPLE_FILES = 4 << 20, 512
_BYTE_ALPHABET = 256


def train_bpe(source: Source, vocab_size: int) -> TokenizerFiles:
    """Train a byte-level BPE (as GPT-2's: no unknown token, any text comes back exactly) on a sample of the source.

    Args:
        vocab_size: wanted entries; a small source may give fewer.

    Raises:
        InputError: fewer entries than the 256 bytes and the end-of-document token need; a source that cannot be read.
    """
    if vocab_size <= _BYTE_ALPHABET:
        raise InputError(
            f"data.bpe_vocab_size={vocab_size}: at least {_BYTE_ALPHABET + 1} (all bytes and {END_OF_DOCUMENT})"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_sample(source), trainer)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_DOCUMENT,
        "clean_up_tokenization_spaces": False,
    }
    contents = {TOKENIZER_FILE: tokenizer.to_str().encode(), CONFIG_FILE: json.dumps(config, indent=2).encode()}
    return TokenizerFiles("the BPE trained on the source", contents)


def _sample(source: Source) -> Iterator[str]:
    """The first texts of evenly chosen files; what a short file leaves over goes to the files behind it."""
    stride = max(1, len(source.files) // SAMPLE_FILES)
    chosen = range(0, len(source.files), stride)
    left = SAMPLE_BYTES
    for i, number in enumerate(chosen):
        share = left // (len(chosen) - i)
        if share == 0:
            continue
        tally = ReadTally()
        only = Source(source.description, source.format, (source.files[number],))
        for piece in read_pieces(only, start=Cursor(), tally=tally, max_bytes=share):
            yield from texts_of(piece.content)
        left -= min(left, tally.source_bytes)


@dataclass(frozen=True)
class EncodedPiece:
    """Token ids (n,) int64 and their flags (n,) uint8 (see headrace.workers.data.rows).

    `stops`: how often the piece teaches the model to stop. `responses`: what follows these tokens, each time alone.
    """

    ids: npt.NDArray[np.int64]
    flags: npt.NDArray[np.uint8]
    where: str
    stops: int
    responses: tuple[Tokens, ...] = ()


class RowTokenizer:
    """Encodes pieces of documents, a batch at a time on all cores.

    Args:
        files: the tokenizer.
        share_prompts: several responses to a prompt share its tokens; else each has them before it.

    Raises:
        InputError: not a tokenizer.json, or none of its tokens ends a document.
    """

    def __init__(self, files: TokenizerFiles, *, share_prompts: bool = True) -> None:
        self._files, self._tokenizer, self._share_prompts = files, open_tokenizer(files), share_prompts
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1
        self._specials = files.special_tokens()
        self.end_id = self._find_end(vocabulary)
        self.begin_ids = self._find_begin()
        added = self._tokenizer.get_added_tokens_decoder()
        stops = frozenset({self.end_id, *files.stop_ids()})
        self._turn_ends = TurnEnds(self.end_id, stops, frozenset(added))
        self._chat: ChatTemplate | None = None
        # The text of the built-in chat template, once it was used.
        self.built_in_template: str | None = None

    def encode(self, pieces: Sequence[Piece]) -> list[EncodedPiece]:
        """Encode pieces in order.

        Raises:
            InputError: a chat that the template refuses; a text that the tokenizer cannot encode.
        """
        texts = [piece for piece in pieces if isinstance(piece.content, str)]
        chats = [self._render(p.content, p) for p in pieces if isinstance(p.content, list)]
        with library_errors(f"{self._files.where}: cannot encode a text"):
            chat_encodings = self._tokenizer.encode_batch([chat.text for chat in chats], add_special_tokens=False)
            encoded_texts = iter(self._encode_texts(texts))
        encoded_chats = zip(chat_encodings, chats, strict=True)
        return [
            self._text_piece(piece, *next(encoded_texts))
            if isinstance(piece.content, str)
            else self._chat_piece(piece, *next(encoded_chats))
            if isinstance(piece.content, list)
            else self._responses_piece(piece, piece.content)
            for piece in pieces
        ]

    def _encode_texts(self, pieces: list[Piece]) -> list[tuple[list[int], bool]]:
        """Ids of texts; of a part of a document, those tokens of the whole that begin in it.

        With each: whether no token stands before these. A part may be white space that gives no token.
        """
        whole = [piece for piece in pieces if piece.starts and piece.ends]
        parts = [piece for piece in pieces if not (piece.starts and piece.ends)]
        self._tokenizer.encode_special_tokens = True
        whole_encodings = self._tokenizer.encode_batch_fast([p.content for p in whole], add_special_tokens=False)
        part_encodings = self._tokenizer.encode_batch(
            [f"{p.before}{p.content}{p.behind}" for p in parts], add_special_tokens=False
        )
        self._tokenizer.encode_special_tokens = False
        ids = {id(piece): (encoding.ids, True) for piece, encoding in zip(whole, whole_encodings, strict=True)}
        for piece, encoding in zip(parts, part_encodings, strict=True):
            begins = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)[:, 0]
            assert isinstance(piece.content, str)
            first = len(piece.before)
            is_own = (begins >= first) & (begins < first + len(piece.content))
            own = np.array(encoding.ids, dtype=np.int64)[is_own].tolist()
            ids[id(piece)] = own, piece.starts or not (self.begin_ids or not first or (begins < first).any())
        return [ids[id(piece)] for piece in pieces]

    @property
    def chat_date(self) -> str:
        """The day that the chat template got as today; empty before its first call."""
        return "" if self._chat is None else self._chat.date

    def _text_piece(self, piece: Piece, encoded: list[int], is_first: bool) -> EncodedPiece:
        ids = (self.begin_ids if piece.starts else []) + encoded + ([self.end_id] if piece.ends else [])
        flags = np.full(len(ids), TARGET, dtype=np.uint8)
        if is_first and ids:
            flags[0] |= STARTS
        return EncodedPiece(np.array(ids, dtype=np.int64), flags, piece.where, piece.ends)

    def _ids(self, text: str, *, special: bool = False) -> list[int]:
        with library_errors(f"{self._files.where}: cannot encode a text"):
            ids: list[int] = self._tokenizer.encode(text, add_special_tokens=special).ids
        return ids

    def _find_begin(self) -> list[int]:
        """What the tokenizer's own post-processor puts before a text, if it is not the end-of-document token."""
        plain, whole = self._ids("a"), self._ids("a", special=True)
        places = [i for i in range(len(whole)) if plain and whole[i : i + len(plain)] == plain]
        begin = whole[: places[0]] if places else []
        return begin if begin != [self.end_id] else []

    def _chat_piece(self, piece: Piece, encoding: Encoding, chat: RenderedChat) -> EncodedPiece:
        assert isinstance(piece.content, list)
        tokens = self._chat_tokens(piece.content, encoding, chat)
        return EncodedPiece(*flagged(tokens), piece.where, tokens.stops)

    def _chat_tokens(self, messages: Messages, encoding: Encoding, chat: RenderedChat) -> ChatTokens:
        ends_with_answer = messages[-1]["role"] == "assistant"
        return chat_tokens(encoding, chat, self._turn_ends, ends_with_answer=ends_with_answer)

    def _responses_piece(self, piece: Piece, content: Responses) -> EncodedPiece:
        """Every response is tokenized behind its prompt, as it would be alone."""
        if isinstance(content.prompt, str):
            sequences = self._text_responses(content.prompt, content)
        else:
            sequences = self._chat_responses(content.prompt, content, piece)
        stops = sum(sequence.stops for sequence in sequences)
        prompt, responses = share_prompt(sequences, piece.where)
        if len(sequences) == 1 or not self._share_prompts:
            prompt, responses = (prompt[0][:0], prompt[1][:0]), [flagged(sequence) for sequence in sequences]
        return EncodedPiece(*prompt, piece.where, stops, tuple(responses))

    def _text_responses(self, prompt: str, content: Responses) -> list[ChatTokens]:
        """A token that holds a character of the response is a target, and the end of the document is one."""
        self._tokenizer.encode_special_tokens = True
        with library_errors(f"{self._files.where}: cannot encode a text"):
            encodings = self._tokenizer.encode_batch(content.sequences, add_special_tokens=False)
        self._tokenizer.encode_special_tokens = False
        found = []
        for encoding in encodings:
            ids = [*self.begin_ids, *encoding.ids, self.end_id]
            ends = np.array([0] * len(self.begin_ids) + [end for _, end in encoding.offsets])
            found.append(ChatTokens(np.array(ids, dtype=np.int64), np.append(ends > len(prompt), True), True))
        return found

    def _chat_responses(self, prompt: Messages, content: Responses, piece: Piece) -> list[ChatTokens]:
        """What the assistant writes in the prompt is no target."""
        has_answers = any(message["role"] == "assistant" for message in prompt)
        num_before = len(self._render(prompt, piece).targets) if has_answers else 0
        found = []
        for messages in content.sequences:
            assert isinstance(messages, list)
            chat = self._render(messages, piece)
            with library_errors(f"{self._files.where}: cannot encode a text"):
                encoding = self._tokenizer.encode(chat.text, add_special_tokens=False)
            found.append(self._chat_tokens(messages, encoding, replace(chat, targets=chat.targets[num_before:])))
        return found

    def _render(self, messages: Messages, piece: Piece) -> RenderedChat:
        if self._chat is None:
            self._chat = self._chat_template()
        return self._chat.render(messages, piece.where, **piece.variables)

    def _chat_template(self) -> ChatTemplate:
        template = self._files.chat_template()
        if template is None:
            begin = "".join(self._tokenizer.id_to_token(number) or "" for number in self.begin_ids)
            named = {"bos_token": begin, "eos_token": self._tokenizer.id_to_token(self.end_id)}
            template = DEFAULT_TEMPLATE
            for name, text in named.items():
                template = template.replace(name, json.dumps(text, ensure_ascii=False))
            self.built_in_template = template
        return ChatTemplate(template, special_tokens=self._specials, where=self._files.where)

    def _find_end(self, vocabulary: dict[str, int]) -> int:
        """The end-of-document token: eos_token, else what ends an answer, else one that is known by its name."""
        named = self._specials.get("eos_token")
        if named is not None:
            return vocabulary[named]
        if stops := self._files.stop_ids():
            if stops[0] not in vocabulary.values():
                raise wrong(f"{self._files.where}: eos_token_id={stops[0]} of {GENERATION_FILE}: not in its vocabulary")
            return stops[0]
        found = [text for text in _KNOWN_ENDS if text in vocabulary]
        if len(found) != 1:
            raise wrong(
                f"{self._files.where}: {' or '.join(found) or 'no token'} ends a document; name one as `eos_token` in "
                f"{CONFIG_FILE} beside it (none or several of {', '.join(_KNOWN_ENDS)})"
            )
        return vocabulary[found[0]]
