"""`make VERB name=value`: what was typed reaches the program unchanged, and neither make nor the shell runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

HOSTILE = [
    "`touch PWNED`",
    "$(touch PWNED)",
    "$(shell touch PWNED)",
    "${shell touch PWNED}",
    '"; touch PWNED; "',
    "'; touch PWNED; '",
    "| touch PWNED",
    "a && touch PWNED # {b} ${c} $$d $HOME \\",
    "two\nlines",
    "-n",
    "é {x} 100%",
]


def called(tmp_path: Path, repo_root: Path, *words: str) -> list[str]:
    """Arguments that the program gets; a stand-in that writes them down takes its place."""
    program, wrote = tmp_path / "bin" / "headrace", tmp_path / "argv.json"
    program.parent.mkdir(exist_ok=True)
    program.write_text(
        f"#!{sys.executable}\nimport json, os, sys\n"
        f"made = [os.environ.get(n, '') for n in ('HEADRACE_CONF', 'HEADRACE_OVERRIDES')]\n"
        f"json.dump([sys.argv[1:], made], open({str(wrote)!r}, 'w'))\n"
    )
    program.chmod(0o755)
    (tmp_path / ".headrace-ready").touch()
    before = set(repo_root.iterdir())
    command = ["make", "-s", "-C", str(repo_root), f"VENV={tmp_path}", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert set(repo_root.iterdir()) == before
    argv, made = json.loads(wrote.read_text())
    return [*argv, *(f"{name}={text}" for name, text in zip(("conf", "overrides"), made, strict=True) if text)]


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_values_arrive_as_text(text: str, tmp_path: Path, repo_root: Path) -> None:
    for words, expected in {
        ("generate", f"run={text}", f"prompt={text}"): ["generate", f"run={text}", "--prompt", text],
        ("export", f"run={text}", f"out={text}"): ["export", f"run={text}", f"out={text}"],
        ("verify", f"hf={text}", "json=1"): ["verify", f"hf={text}", "--json"],
        ("train", f"resume={text}", f"dry={text}"): ["train", "--resume", text, "--dry-run"],
        ("report", f"run={text}"): ["report", f"run={text}"],
        ("bench", f"name={text}"): ["bench", text],
        ("doctor", f"profile={text}", f"out={text}"): ["doctor", "--profile", f"out={text}"],
        ("plan", f"conf={text}", f"overrides={text}"): ["plan", f"conf={text}", f"overrides={text}"],
    }.items():
        assert called(tmp_path, repo_root, *words) == expected


def test_what_is_not_given_is_no_argument(tmp_path: Path, repo_root: Path) -> None:
    for verb in ("generate", "export", "verify", "train", "report", "bench", "doctor", "plan"):
        assert called(tmp_path, repo_root, verb) == [verb]
