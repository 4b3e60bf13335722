"""Where Ray's token is looked for, and that ours is nobody else's to read."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from headrace.platform.control.auth_token import MODE, ensure_token, read_token, token_place, use_token_if_there


@pytest.fixture(autouse=True)
def fresh_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(MODE, "")  # so that it is put back afterwards
    monkeypatch.delenv(MODE)


def test_a_token_is_made_once_and_only_its_user_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not token_place().there
    place = ensure_token()
    assert place.path == tmp_path / ".ray" / "auth_token"
    assert stat.S_IMODE(place.path.stat().st_mode) == 0o600
    first = read_token(place)
    assert first is not None
    assert len(first) == 64
    assert read_token(ensure_token()) == first


def test_variables_come_before_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ensure_token()
    file = tmp_path / "elsewhere"
    file.write_text("secret\n")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(file))
    assert read_token(token_place()) == "secret"
    monkeypatch.setenv("RAY_AUTH_TOKEN", "mine")
    assert read_token(token_place()) == "mine"


def test_joining_makes_no_token(tmp_path: Path) -> None:
    import os

    assert not use_token_if_there().there
    assert MODE not in os.environ
    assert not (tmp_path / ".ray").exists()


def test_a_user_who_switched_tokens_off_gets_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MODE, "disabled")
    assert not ensure_token().there
