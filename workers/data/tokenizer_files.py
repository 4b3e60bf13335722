"""The files of a Hugging Face tokenizer, and what they say: special tokens, chat template, tokens that end an answer.

Files come from outside: nothing in them is executed. The special tokens are those that transformers finds.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from tokenizers import AddedToken, Tokenizer

from headrace.storage.core.errors import ErrorId, HeadraceError, InputError
from headrace.storage.core.outside import parse_json, read_regular

TOKENIZER_FILE, CONFIG_FILE, CHAT_TEMPLATE_FILE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
SPECIAL_TOKENS_FILE, ADDED_TOKENS_FILE = "special_tokens_map.json", "added_tokens.json"
GENERATION_FILE, MODEL_FILE = "generation_config.json", "config.json"
TEMPLATES_FOLDER = "additional_chat_templates"
COMPANIONS = (CONFIG_FILE, CHAT_TEMPLATE_FILE, SPECIAL_TOKENS_FILE, ADDED_TOKENS_FILE, GENERATION_FILE)
MAX_TOKENIZER_BYTES, MAX_COMPANION_BYTES = 256 << 20, 16 << 20
# What transformers takes from config.json where a folder has no generation_config.json.
_MODEL_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")
# Where the tokenizer files name no token, transformers takes that of the tokenizer's class.
_CLASS_TOKENS = {
    "GPT2Tokenizer": {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"},
    "LlamaTokenizer": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    "Qwen2Tokenizer": {"eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
}
# Special tokens that have a name in transformers, in the order in which it gives ids to new ones.
_STANDARD = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# Lists of special tokens without names: transformers' key, and the one of its older versions.
_EXTRA, _MORE = "extra_special_tokens", "additional_special_tokens"


def wrong(text: str) -> InputError:
    """The error of a tokenizer that cannot be used."""
    return InputError(text, id=ErrorId.tokenizer_wrong)


@dataclass(frozen=True)
class TokenizerFiles:
    """The files of a tokenizer, by name; `tokenizer.json` is always there."""

    where: str
    contents: dict[str, bytes]

    @property
    def digest(self) -> str:
        """sha256 of tokenizer.json."""
        return hashlib.sha256(self.contents[TOKENIZER_FILE]).hexdigest()

    @property
    def digests(self) -> dict[str, str]:
        """sha256 of every file, by name."""
        return {name: hashlib.sha256(content).hexdigest() for name, content in sorted(self.contents.items())}

    @property
    def identity(self) -> str:
        """sha256 over all the files: the chat template counts too."""
        return hashlib.sha256(json.dumps(self.digests).encode()).hexdigest()

    def save(self, folder: Path) -> None:
        """Write the files into an existing folder."""
        for name, content in self.contents.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(content)

    def json(self, name: str) -> dict[str, Any]:
        """The object in a file; empty where there is no such file.

        Raises:
            InputError: it is not a JSON object.
        """
        if name not in self.contents:
            return {}
        try:
            value = parse_json(self.contents[name])
        except ValueError as error:
            raise wrong(f"{self.where}: its {name} is not JSON ({error})") from error
        if not isinstance(value, dict):
            raise wrong(f"{self.where}: its {name} is not a JSON object")
        return value

    def text(self, name: str) -> str:
        """The text of a file.

        Raises:
            InputError: it is not UTF-8.
        """
        try:
            return self.contents[name].decode("utf-8")
        except UnicodeDecodeError as error:
            raise wrong(f"{self.where}: its {name} is not UTF-8 text ({error.reason})") from error

    def special_tokens(self) -> dict[str, str]:
        """`eos_token`, `bos_token`, `pad_token` and every other named special token, as transformers finds them.

        The order, later ones win: the tokenizer's class, tokenizer_config.json, and special_tokens_map.json unless
        tokenizer_config.json has `added_tokens_decoder`.

        Raises:
            InputError: a file that is not a JSON object.
        """
        texts = {name: token_text(value) for name, value in self._special_fields()[0].items()}
        return {name: text for name, text in texts.items() if text}

    def special_added_tokens(self) -> list[AddedToken]:
        """All special tokens, the named ones first, in the order in which transformers gives ids to new ones.

        Raises:
            InputError: as special_tokens, and a token whose fields are not those of a token.
        """
        named, more, late = self._special_fields()
        tokens: dict[str, AddedToken] = {}
        given = [*named.items(), *((_EXTRA, value) for value in (*more, *late))]
        for i, (name, value) in enumerate(given):
            fields = {"content": value} if isinstance(value, str) else value
            if not isinstance(fields, dict) or not token_text(fields) or value in [other for _, other in given[:i]]:
                continue
            try:
                token = _added_token({"normalized": False, **fields, "special": True})
            except ValueError as error:
                raise wrong(f"{self.where}: its {name} cannot be read ({error})") from error
            tokens[token.content] = token
        return list(tokens.values())

    def _special_fields(self) -> tuple[dict[str, Any], list[Any], list[Any]]:
        """Special tokens as texts or fields: by name in transformers' order, without a name, and late ones.

        Late ones have no name either: transformers does not see them yet when it reads added_tokens.json.
        """
        config = self.json(CONFIG_FILE)
        values = {**self._class_tokens(config.get("tokenizer_class")), **config}
        if values.get(_MORE) is not None and not values.get(_EXTRA):
            values[_EXTRA] = values.pop(_MORE)
        by_name = _take_named(values)
        own = {
            name: value
            for name, value in values.items()
            if name.endswith("_token") and name not in _STANDARD and isinstance(value, str)
        }
        if "added_tokens_decoder" not in config:
            listed = values.get(_EXTRA) or []
            values |= self.json(SPECIAL_TOKENS_FILE)
            if isinstance(extra := values.get(_EXTRA), list) and isinstance(listed, list) and extra is not listed:
                values[_EXTRA] = [*listed, *(token for token in extra if token not in listed)]
            by_name |= _take_named(values)
        lists = [values.get(_EXTRA), None if _EXTRA in values else values.get(_MORE)]
        named = {name: values[name] for name in _STANDARD if name in values}
        named |= {name: value for name, value in values.items() if name.endswith("_token") and name not in named}
        more, late = (found if isinstance(found, list) else [] for found in lists)
        return {**named, **own, **by_name}, more, late

    def _class_tokens(self, name: object) -> Mapping[str, str]:
        kind = name.removesuffix("Fast") if isinstance(name, str) else ""
        if kind == "LlamaTokenizer" and b'"ByteLevel"' in self.contents[TOKENIZER_FILE]:
            return {}  # as Llama 3: transformers takes its general class
        return _CLASS_TOKENS.get(kind, {})

    def added_tokens(self) -> list[tuple[int, AddedToken]]:
        """Tokens that the companion files declare besides those of tokenizer.json: ids and tokens, in their order.

        Raises:
            InputError: not what transformers writes.
        """
        declared: Any = self.json(CONFIG_FILE).get("added_tokens_decoder")
        if declared is None:
            texts = self.json(ADDED_TOKENS_FILE)
            named, more, _ = self._special_fields()
            special = {*map(token_text, more), *(token_text(named.get(name)) for name in _STANDARD)}
            declared = {
                number: {"content": text, "special": text in special, "normalized": text not in special}
                for text, number in texts.items()
            }
        try:
            ids = {int(number): fields for number, fields in declared.items()}
            return [(number, _added_token(ids[number])) for number in sorted(ids)]
        except (AttributeError, TypeError, ValueError) as error:
            raise wrong(
                f"{self.where}: the added tokens of its {CONFIG_FILE} or {ADDED_TOKENS_FILE} cannot be read ({error})"
            ) from error

    def chat_template(self) -> str | dict[str, str] | None:
        """The template, or several by name; files of their own win over tokenizer_config.json, as in transformers.

        Raises:
            InputError: not a text, and not texts by name.
        """
        files = {
            PurePosixPath(name).stem: self.text(name) for name in self.contents if name.startswith(TEMPLATES_FOLDER)
        }
        if CHAT_TEMPLATE_FILE in self.contents:
            files["default"] = self.text(CHAT_TEMPLATE_FILE)
        found = files or self.json(CONFIG_FILE).get("chat_template")
        if isinstance(found, list) and all(isinstance(entry, dict) for entry in found):
            found = {entry.get("name"): entry.get("template") for entry in found}
        if isinstance(found, dict):
            if not all(isinstance(text, str) for pair in found.items() for text in pair):
                raise wrong(f"{self.where}: the chat_template of its {CONFIG_FILE} is not texts by name")
            return found["default"] if list(found) == ["default"] else found
        if not isinstance(found, str | None):
            raise wrong(f"{self.where}: the chat_template of its {CONFIG_FILE} is not a text")
        return found or None

    def stop_ids(self) -> tuple[int, ...]:
        """The ids that end an answer by generation_config.json, in its order.

        Raises:
            InputError: `eos_token_id` is neither a number nor a list of them.
        """
        given = self.json(GENERATION_FILE).get("eos_token_id")
        ids = [] if given is None else given if isinstance(given, list) else [given]
        if not all(type(number) is int and number >= 0 for number in ids):
            raise wrong(f"{self.where}: eos_token_id={given!r} of {GENERATION_FILE}: a token id or a list of them")
        return tuple(ids)


@contextmanager
def library_errors(problem: str) -> Iterator[None]:
    """Give what the tokenizers library throws a sentence: it raises bare Exception, and its panics are not even that.

    Raises:
        InputError: `problem` and the library's own words.
    """
    try:
        yield
    except (HeadraceError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise wrong(f"{problem} ({error})") from error


def open_tokenizer(files: TokenizerFiles) -> Tokenizer:
    """The tokenizer with all its added and special tokens, as transformers opens it; it neither cuts nor pads.

    A special token that is not in the vocabulary gets a new id behind it, as in transformers. For `eos_token` that is
    an error: a model that never saw its end token does not stop.

    Raises:
        InputError: not a tokenizer.json, or companions that do not fit it.
    """
    names = set(files.special_tokens().values())
    declared, special = files.added_tokens(), files.special_added_tokens()
    with library_errors(f"{files.where}: not a Hugging Face {TOKENIZER_FILE}"):
        tokenizer = Tokenizer.from_str(files.text(TOKENIZER_FILE))
        # A tokenizer.json may hold settings of the last batch that was encoded with it.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        for _, token in declared:
            token.special |= token.content in names
        tokenizer.add_tokens([token for _, token in declared])
    for number, token in declared:
        if tokenizer.token_to_id(token.content) != number:
            raise wrong(
                f"{files.where}: its added token {token.content!r} has the id {number} in {CONFIG_FILE} or "
                f"{ADDED_TOKENS_FILE}, and {tokenizer.token_to_id(token.content)} after {TOKENIZER_FILE} is read"
            )
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    if not vocabulary:
        raise wrong(f"{files.where}: its vocabulary is empty")
    added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    end = files.special_tokens().get("eos_token")
    if end is not None and end not in vocabulary:
        raise wrong(f"{files.where}: its eos_token {end!r} is not in its vocabulary")
    tokenizer.add_tokens([token for token in special if token.content not in added])
    return tokenizer


def _take_named(values: dict[str, Any]) -> dict[str, Any]:
    """Take `extra_special_tokens` out of the values where it holds tokens by name."""
    return dict(values.pop(_EXTRA)) if isinstance(values.get(_EXTRA), dict) else {}


def _added_token(fields: Mapping[str, Any]) -> AddedToken:
    kinds = {"content": str, **dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word", "special"), bool)}
    given = {key: fields[key] for key in kinds if key in fields}
    if not given.get("content") or not all(type(value) is kinds[key] for key, value in given.items()):
        raise ValueError(f"{str(fields)[:80]} is not a token")
    return AddedToken(**given)


def token_text(value: object) -> str | None:
    """The text of a token: itself, or the `content` of an object."""
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else None


def is_companion(name: str) -> bool:
    """Whether a file of this name belongs to a tokenizer, and lies below its folder."""
    path = PurePosixPath(name)
    return name in COMPANIONS or (path.parent.as_posix() == TEMPLATES_FOLDER and path.suffix == ".jinja")


def names_there(folder: Path) -> list[str]:
    """The companion files in a folder, by name; also what cannot be read in their place."""
    templates = sorted((folder / TEMPLATES_FOLDER).glob("*.jinja"))
    names = [*COMPANIONS, *(f"{TEMPLATES_FOLDER}/{path.name}" for path in templates)]
    return [name for name in names if os.path.lexists(folder / name)]


def read_tokenizer_files(path: str | Path) -> TokenizerFiles:
    """Read tokenizer.json, given itself or by its folder, and its companions.

    The generation_config.json of a model folder that has none is what transformers makes of its config.json.

    Raises:
        InputError: there is none, or it cannot be read.
    """
    given = Path(path).expanduser()
    main = given / TOKENIZER_FILE if given.is_dir() else given
    if not main.is_file():
        raise wrong(
            f"data.tokenizer={path}: no {TOKENIZER_FILE} there; give one (transformers' `save_pretrained` of a fast "
            "tokenizer writes it), or leave data.tokenizer unset to train one"
        )
    folder = main.parent
    try:
        contents = {TOKENIZER_FILE: read_regular(main, MAX_TOKENIZER_BYTES)}
        contents |= {name: read_regular(folder / name, MAX_COMPANION_BYTES) for name in names_there(folder)}
        files = TokenizerFiles(str(main), contents)
        if GENERATION_FILE not in contents and (folder / MODEL_FILE).is_file():
            model = TokenizerFiles(str(main), {MODEL_FILE: read_regular(folder / MODEL_FILE, MAX_COMPANION_BYTES)})
            values = {key: value for key, value in model.json(MODEL_FILE).items() if key in _MODEL_KEYS}
            if values.get("eos_token_id") is not None:
                contents[GENERATION_FILE] = json.dumps({"_from_model_config": True, **values}, indent=2).encode()
    except OSError as error:
        raise wrong(f"{error.filename}: cannot be read ({error.strerror})") from error
    return files
