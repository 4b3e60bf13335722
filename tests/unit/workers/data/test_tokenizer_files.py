"""Special tokens, added tokens and chat templates are found where transformers finds them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from headrace.workers.data.tokenizer_files import open_tokenizer, read_tokenizer_files
from headrace.workers.data.tokenizing import RowTokenizer

NAMES = ("eos_token", "bos_token", "pad_token")
TEXT = "a b <|fin|> c <go> d [PAD] <|im_end|> </s> <x> a <pad> b <mask> <new> <newer>"
PLAIN = {"tokenizer_class": "PreTrainedTokenizerFast"}


def added(content: str, *, special: bool = True, **more: Any) -> dict[str, Any]:
    fields = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    return {"content": content, **fields, "special": special, **more}


# tokenizer.json holds ids 0 to 9; <|fin|>, <go> and [PAD] are plain words of it unless a case says otherwise.
CASES: dict[str, dict[str, dict[str, Any]]] = {
    "tokenizer_config": {"tokenizer_config.json": {**PLAIN, "eos_token": "<|fin|>", "bos_token": "<go>"}},
    "objects": {
        "tokenizer_config.json": {
            **PLAIN,
            "eos_token": {"__type": "AddedToken", **added("<|fin|>")},
            "pad_token": {"__type": "AddedToken", **added("[PAD]")},
        }
    },
    "the map alone": {
        "tokenizer_config.json": PLAIN,
        "special_tokens_map.json": {"eos_token": "<|fin|>", "bos_token": added("<go>"), "pad_token": "[PAD]"},
    },
    "the map wins": {
        "tokenizer_config.json": {**PLAIN, "eos_token": "</s>", "pad_token": "[PAD]"},
        "special_tokens_map.json": {"eos_token": "<|fin|>"},
    },
    "the map is passed over": {
        "tokenizer_config.json": {
            **PLAIN,
            "eos_token": "</s>",
            "added_tokens_decoder": {"6": added("</s>"), "10": added("<x>")},
        },
        "special_tokens_map.json": {"eos_token": "<|fin|>", "pad_token": "[PAD]"},
    },
    "a token of the decoder ends": {
        "tokenizer_config.json": {
            **PLAIN,
            "eos_token": "<x>",
            "added_tokens_decoder": {"10": added("<x>", lstrip=True), "11": added("[y]", special=False)},
        }
    },
    "a token of added_tokens.json ends": {
        "tokenizer_config.json": {**PLAIN, "eos_token": "<x>"},
        "added_tokens.json": {"<x>": 10},
    },
    "more of them": {
        "tokenizer_config.json": {**PLAIN, "eos_token": "</s>", "additional_special_tokens": ["<go>", "[PAD]"]}
    },
    "more of them in the map": {
        "tokenizer_config.json": {**PLAIN, "eos_token": "</s>"},
        "special_tokens_map.json": {"additional_special_tokens": ["<go>", "[PAD]"]},
    },
    "names that the vocabulary lacks": {
        "tokenizer_config.json": {
            **PLAIN,
            "pad_token": "<pad>",
            "image_token": "<image>",
            "mask_token": {"__type": "AddedToken", **added("<mask>", lstrip=True)},
            "extra_special_tokens": ["<more>", "<pad>", "<go>"],
            "bos_token": "<begin>",
            "eos_token": "</s>",
        }
    },
    "a name that the vocabulary lacks, in the map": {
        "tokenizer_config.json": {**PLAIN, "eos_token": "</s>"},
        "special_tokens_map.json": {"pad_token": added("<pad>", lstrip=True), "unk_token": "<none>"},
    },
    "a declared token that is special by its name": {
        "tokenizer_config.json": {
            **PLAIN,
            "eos_token": "</s>",
            "mask_token": "<x>",
            "added_tokens_decoder": {"10": added("<x>", special=False)},
        }
    },
    "lists in two files": {
        "tokenizer_config.json": {**PLAIN, "eos_token": "</s>", "extra_special_tokens": ["<go>", "<new>"]},
        "special_tokens_map.json": {"extra_special_tokens": ["[PAD]", "<new>", "<newer>"]},
    },
    "names in two files": {
        "tokenizer_config.json": {**PLAIN, "eos_token": "</s>", "extra_special_tokens": {"image_token": "<go>"}},
        "special_tokens_map.json": {"extra_special_tokens": {"image_token": "[PAD]", "audio_token": "<new>"}},
    },
    "a list and names": {
        "tokenizer_config.json": {**PLAIN, "eos_token": "</s>", "extra_special_tokens": ["<go>"]},
        "special_tokens_map.json": {"extra_special_tokens": {"image_token": "[PAD]"}},
    },
    "names and a list": {
        "tokenizer_config.json": {**PLAIN, "eos_token": "</s>", "extra_special_tokens": {"image_token": "[PAD]"}},
        "special_tokens_map.json": {"extra_special_tokens": ["<go>"]},
    },
    "the older key in both files": {
        "tokenizer_config.json": {**PLAIN, "eos_token": "</s>", "additional_special_tokens": ["<go>"]},
        "special_tokens_map.json": {"additional_special_tokens": ["[PAD]"]},
    },
    "the older key and the newer one": {
        "tokenizer_config.json": {**PLAIN, "eos_token": "</s>", "additional_special_tokens": ["<go>", "<x>"]},
        "special_tokens_map.json": {"extra_special_tokens": ["[PAD]"]},
        "added_tokens.json": {"<x>": 10},
    },
    "the older key in the map names an added token": {
        "tokenizer_config.json": {**PLAIN, "eos_token": "</s>"},
        "special_tokens_map.json": {"additional_special_tokens": ["<x>"]},
        "added_tokens.json": {"<x>": 10},
    },
    "a name of one's own in two files": {
        "tokenizer_config.json": {**PLAIN, "eos_token": "</s>", "image_token": "<go>"},
        "special_tokens_map.json": {"image_token": "[PAD]", "audio_token": "<new>"},
    },
    "a class of Llama": {"tokenizer_config.json": {"tokenizer_class": "LlamaTokenizerFast"}},
    "a class of Llama that names its end": {
        "tokenizer_config.json": {"tokenizer_class": "LlamaTokenizer", "eos_token": "<|fin|>", "pad_token": "[PAD]"}
    },
    "a class of Qwen": {"tokenizer_config.json": {"tokenizer_class": "Qwen2Tokenizer", "bos_token": None}},
    "a class of Qwen that names its end": {
        "tokenizer_config.json": {"tokenizer_class": "Qwen2TokenizerFast", "eos_token": "<|im_end|>"}
    },
}


def bpe_words(words: list[str]) -> Tokenizer:
    """A byte-pair tokenizer whose special words are whole entries, as a class of transformers rebuilds it."""
    return Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[], unk_token="<unk>"))


def write_folder(folder: Path, files: dict[str, dict[str, Any]]) -> Path:
    words = ["<unk>", "a", "b", "c", "<|fin|>", "<go>", "</s>", "[PAD]", "<|im_end|>", "<s>", "<|endoftext|>"]
    by_class = files.get("tokenizer_config.json", {}).get("tokenizer_class") != PLAIN["tokenizer_class"]
    tokenizer = (
        bpe_words(words)
        if by_class
        else Tokenizer(models.WordLevel({word: i for i, word in enumerate(words[:10])}, unk_token="<unk>"))
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_tokens([AddedToken("<|im_end|>", special=True), AddedToken("</s>", special=True)])
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("case", CASES)
def test_special_tokens_are_those_of_transformers(case: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    files = read_tokenizer_files(write_folder(tmp_path, CASES[case]))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours, found = open_tokenizer(files), files.special_tokens()
    for name in NAMES:
        assert found.get(name) == getattr(theirs, name), name
        number = None if found.get(name) is None else ours.token_to_id(found[name])
        assert number == getattr(theirs, f"{name}_id"), name
    assert RowTokenizer(files).end_id == theirs.eos_token_id
    assert ours.get_vocab_size() == len(theirs)
    if type(theirs).__name__ == "TokenizersBackend":  # other classes cut words by their own rules
        assert ours.encode(TEXT, add_special_tokens=False).ids == theirs.encode(TEXT, add_special_tokens=False)
        assert found == {name: str(token) for name, token in theirs.special_tokens_map.items()}
        assert written(ours.get_added_tokens_decoder()) == written(theirs.added_tokens_decoder)


def written(tokens: dict[int, AddedToken]) -> dict[int, str]:
    """Ids and tokens with all their fields; AddedToken compares texts only."""
    return {number: repr(token) for number, token in sorted(tokens.items())}


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        ({"generation_config.json": {"eos_token_id": [6, 8, 4], "top_p": 0.9}}, (6, 8, 4)),
        ({"generation_config.json": {"eos_token_id": 8}, "config.json": {"eos_token_id": 4}}, (8,)),
        (
            {"config.json": {"model_type": "llama", "eos_token_id": [8, 6], "bos_token_id": 9, "pad_token_id": 7}},
            (8, 6),
        ),
        ({"config.json": {"model_type": "llama", "eos_token_id": None}}, ()),
        ({}, ()),
    ],
)
def test_the_tokens_that_end_an_answer(files: dict[str, Any], wanted: tuple[int, ...], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    found = read_tokenizer_files(write_folder(tmp_path, {"tokenizer_config.json": PLAIN, **files}))
    assert found.stop_ids() == wanted
    if "generation_config.json" in files:
        theirs = transformers.GenerationConfig.from_pretrained(tmp_path)
        assert found.contents["generation_config.json"] == (tmp_path / "generation_config.json").read_bytes()
    elif files:
        model = transformers.AutoConfig.from_pretrained(tmp_path)
        theirs = transformers.GenerationConfig.from_model_config(model)
    else:
        return
    ids = theirs.eos_token_id
    assert wanted == tuple(ids if isinstance(ids, list) else () if ids is None else (ids,))
    if wanted and "generation_config.json" not in files:
        written = json.loads(found.contents["generation_config.json"])
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            assert written[key] == getattr(theirs, key)


@pytest.mark.parametrize("named", ["config", "file", "folder"])
def test_chat_templates_are_found_where_transformers_finds_them(named: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    listed = [{"name": "default", "template": "of config"}, {"name": "rag", "template": "rag of config"}]
    config = {**PLAIN, "eos_token": "</s>", "chat_template": listed if named == "config" else "of config"}
    folder = write_folder(tmp_path, {"tokenizer_config.json": config})
    if named != "config":
        (folder / "chat_template.jinja").write_text("of file")
    if named == "folder":
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates" / "tool_use.jinja").write_text("of folder")
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    files = read_tokenizer_files(folder)
    assert files.chat_template() == theirs.chat_template
    copy = tmp_path / "copy"
    copy.mkdir()
    files.save(copy)
    assert read_tokenizer_files(copy).contents == files.contents
    assert transformers.AutoTokenizer.from_pretrained(copy).chat_template == theirs.chat_template
