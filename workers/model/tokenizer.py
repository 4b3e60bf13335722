"""A model's tokenizer, for prompts and for what the model answers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from headrace.workers.data.tokenizer_files import (
    CONFIG_FILE,
    TokenizerFiles,
    library_errors,
    open_tokenizer,
    read_tokenizer_files,
)
from headrace.workers.data.tokenizing import RowTokenizer


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
        with library_errors(f"{self.files.where}: cannot encode the prompt"):
            return [*self.begin_ids, *self.tokenizer.encode(text, add_special_tokens=False).ids]

    def decode(self, ids: list[int]) -> str:
        """Text of ids, without special tokens."""
        with library_errors(f"{self.files.where}: cannot decode the answer"):
            return self.tokenizer.decode(ids, skip_special_tokens=True)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """What ends an answer: the ids that generation_config.json lists, and the end of a document."""
        return tuple(dict.fromkeys((*self.files.stop_ids(), self.end_id)))

    def files_for_transformers(self) -> dict[str, bytes]:
        """The files by name; tokenizer_config.json, which AutoTokenizer needs, is made if there is none."""
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": self.tokenizer.id_to_token(self.end_id),
            "clean_up_tokenization_spaces": False,
        }
        return {CONFIG_FILE: json.dumps(config, indent=2).encode(), **self.files.contents}

    def ids_for_transformers(self) -> dict[str, Any]:
        """What config.json says of the special tokens: the ids that end an answer, and the one that begins a text."""
        stops = self.files.stop_ids() or (self.end_id,)
        begin = self.tokenizer.token_to_id(self.files.special_tokens().get("bos_token", ""))
        return {"eos_token_id": stops[0] if len(stops) == 1 else list(stops), "bos_token_id": begin}


def load_tokenizer(path: Path | str) -> TextTokenizer:
    """Read tokenizer.json (itself or its folder) and its companions.

    Raises:
        InputError: there is none, or it is not one.
    """
    files = read_tokenizer_files(path)
    rows = RowTokenizer(files)
    return TextTokenizer(files, open_tokenizer(files), tuple(rows.begin_ids), rows.end_id)
