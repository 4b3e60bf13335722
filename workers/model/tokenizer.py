"""A model's tokenizer, for prompts and for what the model answers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from headrace.workers.data.prepared import TOKENIZER_FILE
from headrace.workers.data.tokenizing import CONFIG_FILE, RowTokenizer, TokenizerFiles, read_tokenizer_files


@dataclass(frozen=True)
class TextTokenizer:
    """Text to the ids that the model saw in training, and back.

    Args:
        begin_ids: what stands before a text. end_id: what ends one.
    """

    files: TokenizerFiles
    tokenizer: Tokenizer
    begin_ids: tuple[int, ...]
    end_id: int

    def encode(self, text: str) -> list[int]:
        """Ids of a text that starts a document; names of special tokens are the special tokens."""
        return [*self.begin_ids, *self.tokenizer.encode(text, add_special_tokens=False).ids]

    def decode(self, ids: list[int]) -> str:
        """Text of ids, without special tokens."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def files_for_transformers(self) -> dict[str, bytes]:
        """The files by name; tokenizer_config.json, which AutoTokenizer wants, is made where there is none."""
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": self.tokenizer.id_to_token(self.end_id),
            "clean_up_tokenization_spaces": False,
        }
        return {CONFIG_FILE: json.dumps(config, indent=2).encode(), **self.files.contents}


def load_tokenizer(path: Path | str) -> TextTokenizer:
    """Read tokenizer.json (itself or its folder) and its companions.

    Raises:
        InputError: there is none, or it is not one.
    """
    files = read_tokenizer_files(path)
    rows = RowTokenizer(files)
    tokenizer = Tokenizer.from_str(files.contents[TOKENIZER_FILE].decode("utf-8"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return TextTokenizer(files, tokenizer, tuple(rows.begin_ids), rows.end_id)
