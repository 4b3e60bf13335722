"""Which files a source is made of."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from headrace.helpers.tiers import has_id
from headrace.storage.core.errors import ErrorId, InputError
from headrace.workers.data.config import DataConfig, SourceFormat
from headrace.workers.data.sources import find_source

Config = Callable[..., DataConfig]


def fill(root: Path, *names: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"content of {name}")


def test_stdlib_is_real_text_of_this_interpreter(data_config: Config) -> None:
    source = find_source(data_config("stdlib"))
    names = [file.name for file in source.files]
    assert source.format is SourceFormat.source_tree
    assert {"os.py", "json/decoder.py"} <= set(names)
    assert names == sorted(names)
    assert not any("site-packages" in name or "dist-packages" in name for name in names)
    assert source.num_bytes > 5_000_000


@pytest.mark.parametrize(
    ("names", "expected", "chosen"),
    [
        (["a.py", "p/b.py", "README.md"], SourceFormat.source_tree, ["a.py", "p/b.py"]),
        (["b.txt", "a.md", "c.bin"], SourceFormat.text, ["a.md", "b.txt"]),
        (["x/1.jsonl", "2.ndjson", "3.json"], SourceFormat.jsonl, ["2.ndjson", "3.json", "x/1.jsonl"]),
        (["a.py", "settings.json", "b.csv"], SourceFormat.source_tree, ["a.py"]),
        (["1.parquet"], SourceFormat.parquet, ["1.parquet"]),
        (["a.py", ".git/b.py", "lib/site-packages/c.py", "node_modules/d.py"], SourceFormat.source_tree, ["a.py"]),
    ],
)
def test_auto_goes_by_suffix(
    tmp_path: Path, data_config: Config, names: list[str], expected: SourceFormat, chosen: list[str]
) -> None:
    fill(tmp_path, *names)
    source = find_source(data_config(tmp_path))
    assert source.format is expected
    assert [file.name for file in source.files] == chosen
    hidden = sum(name.startswith((".", "lib", "node")) or name == "c.bin" for name in names)
    assert sum(source.skipped.values()) == hidden


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("a.csv", "Parquet"),
        ("a.XLSX", "Parquet"),
        ("a.json.gz", "unpack"),
        ("a.arrow", "to_parquet"),
        ("a", "data.format="),
    ],
)
def test_an_unknown_suffix_is_refused_with_the_remedy(
    tmp_path: Path, data_config: Config, name: str, remedy: str
) -> None:
    fill(tmp_path, name)
    with pytest.raises(InputError, match=remedy, check=has_id(ErrorId.data_wrong)) as caught:
        find_source(data_config(tmp_path / name))
    assert str(tmp_path / name) in str(caught.value)
    assert find_source(data_config(tmp_path / name, format=SourceFormat.text)).format is SourceFormat.text
    with pytest.raises(InputError, match=f"no file matches.*{Path(name).suffix.lower()}"):
        find_source(data_config(tmp_path))


def test_a_folder_of_several_formats_needs_a_word(tmp_path: Path, data_config: Config) -> None:
    fill(tmp_path, "a.py", "b.jsonl", "c.jsonl")
    with pytest.raises(InputError, match=r"several formats \(2 jsonl, 1 source_tree\); choose with data.format"):
        find_source(data_config(tmp_path))
    assert len(find_source(data_config(tmp_path, format=SourceFormat.jsonl)).files) == 2


def test_pattern_chooses_files(tmp_path: Path, data_config: Config) -> None:
    fill(tmp_path, "a.c", "src/b.c", "b.h")
    assert [file.name for file in find_source(data_config(tmp_path, pattern="**/*.c")).files] == ["a.c", "src/b.c"]
    with pytest.raises(InputError, match=r"data.pattern='/\*.c'"):
        find_source(data_config(tmp_path, pattern="/*.c"))


def test_what_is_not_there_is_named(tmp_path: Path, data_config: Config) -> None:
    with pytest.raises(InputError, match=r"nowhere: cannot be read \(No such file"):
        find_source(data_config(tmp_path / "nowhere"))
    with pytest.raises(InputError, match=r"no file matches data.pattern='\*\*/\*.py', and none is .txt"):
        find_source(data_config(tmp_path))
    with pytest.raises(InputError, match=r"no .json, .jsonl, .ndjson file"):
        find_source(data_config(tmp_path, format=SourceFormat.jsonl))
    (tmp_path / "a.txt").touch()
    with pytest.raises(InputError, match=r"1 file\(s\), all of them empty"):
        find_source(data_config(tmp_path / "a.txt"))


def test_identity_changes_with_name_size_and_time(tmp_path: Path, data_config: Config) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one")
    os.utime(path, ns=(1, 1))
    seen = {find_source(data_config(path)).identity()}
    os.utime(path, ns=(1, 2))
    seen.add(find_source(data_config(path)).identity())
    path.write_text("four")
    os.utime(path, ns=(1, 1))
    seen.add(find_source(data_config(path)).identity())
    path.rename(tmp_path / "b.txt")
    seen.add(find_source(data_config(tmp_path / "b.txt")).identity())
    assert len(seen) == 4
    assert find_source(data_config(tmp_path / "b.txt")).identity() in seen
