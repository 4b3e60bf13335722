"""Small sources and one small prepared folder."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from headrace.workers.data import prepare
from headrace.workers.data.config import DataConfig
from headrace.workers.data.prepare import PrepareProgress, prepare_into
from headrace.workers.data.prepared import PreparedData

SAYING = "the river turns a wheel and the wheel turns the stone ä 水 so that grain becomes flour while nobody sleeps"
WORDS = SAYING.split()


def some_text(num_words: int, seed: int) -> str:
    """Reproducible lines of words."""
    generator = random.Random(seed)
    return "".join(generator.choice(WORDS) + ("\n" if i % 11 == 10 else " ") for i in range(num_words))


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[..., Path]:
    """Write records, one a line; a string is written as it is."""

    def write(records: list[Any], name: str = "source.jsonl") -> Path:
        path = tmp_path / name
        lines = [record if isinstance(record, str) else json.dumps(record, ensure_ascii=False) for record in records]
        path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="session")
def prepared_data(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    """About 100 rows of 32 tokens from 60 documents of very different lengths."""
    folder = tmp_path_factory.mktemp("prepared")
    source = folder / "source.jsonl"
    texts = [some_text(3 + (i * i) % 120, seed=i) for i in range(60)]
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return prepare_into(data_config(source, seq_len=32), folder / "rows")


def data_config(source: Path | str, **values: Any) -> DataConfig:
    """A configuration with a tiny BPE."""
    return DataConfig(**{"name": "t", "source": str(source), "bpe_vocab_size": 300, "seq_len": 16, **values})


@pytest.fixture(name="data_config")
def data_config_fixture() -> Callable[..., DataConfig]:
    """The function above, for tests (tests are not a package)."""
    return data_config


@pytest.fixture
def interrupt(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Prepare into a folder in batches of few bytes, until control-C at a call of `progress`."""

    def run(config: DataConfig, folder: Path, *, stop_at: int, batch_bytes: int) -> None:
        calls = itertools.count(1)

        def stop(_: PrepareProgress) -> None:
            if next(calls) == stop_at:
                raise KeyboardInterrupt

        monkeypatch.setattr(prepare, "BATCH_BYTES", batch_bytes)
        monkeypatch.setattr(prepare, "COMMIT_BYTES", 1)
        with pytest.raises(KeyboardInterrupt):
            prepare_into(config, folder, progress=stop)

    return run
