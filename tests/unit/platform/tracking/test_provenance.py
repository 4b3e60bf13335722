from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from headrace.platform.tracking.provenance import package_versions, provenance, source_state


def git(folder: Path, *words: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    done = subprocess.run(["git", "-C", str(folder), *identity, *words], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_commit_and_local_changes_of_a_checkout(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q")
    (tmp_path / "a").write_text("1")
    git(tmp_path, "add", "a")
    git(tmp_path, "commit", "-q", "-m", "x")
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert source_state(tmp_path) == (commit, False)
    (tmp_path / "untracked").write_text("1")
    assert source_state(tmp_path) == (commit, False)
    (tmp_path / "a").write_text("2")
    assert source_state(tmp_path) == (commit, True)


def test_a_folder_inside_another_checkout_is_not_that_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    git(tmp_path, "init", "-q")
    (tmp_path / "inner").mkdir()
    monkeypatch.delenv("HEADRACE_COMMIT", raising=False)
    assert source_state(tmp_path / "inner") == ("unknown", None)
    monkeypatch.setenv("HEADRACE_COMMIT", "abc")
    assert source_state(tmp_path / "inner") == ("abc", None)


def test_what_produced_a_number_is_named() -> None:
    assert {"python", "torch", "ray"} <= set(package_versions())
    found = provenance().to_json()
    assert found["machine"]["cores"] >= 1
    assert found["machine"]["memory_gib"] > 0
