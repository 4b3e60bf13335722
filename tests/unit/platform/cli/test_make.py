"""`make VERB name=value`: what was typed reaches the program unchanged, and neither make nor the shell runs it."""

from __future__ import annotations

import subprocess
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


VERBS = ("generate", "export", "verify", "eval", "train", "sweep", "report", "compare", "bench", "doctor", "plan")


def called(tmp_path: Path, repo_root: Path, *words: str) -> dict[str, list[str]]:
    """Arguments that the program gets, by verb, and the conf, overrides and runs of the last call."""
    program, wrote = tmp_path / "bin" / "headrace", tmp_path / "argv"
    program.parent.mkdir(exist_ok=True)
    program.write_text(
        f"#!/bin/sh\n{{ printf '%s\\0' \"$@\"; printf '\\001\\0'; }} >> {wrote}\n"
        f'printf \'%s\\0\' "$HEADRACE_CONF" "$HEADRACE_OVERRIDES" "$HEADRACE_RUNS" > {wrote}.env\n'
    )
    program.chmod(0o755)
    (tmp_path / ".headrace-ready").touch()
    command = ["make", "-s", "-C", str(repo_root), f"VENV={tmp_path}", *VERBS, *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    assert not (repo_root / "PWNED").exists()
    calls = [call.split("\0")[:-1] for call in wrote.read_text().split("\001\0")[:-1]]
    return {verb: rest for verb, *rest in calls} | {"": Path(f"{wrote}.env").read_text().split("\0")[:-1]}


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_values_arrive_as_text(text: str, tmp_path: Path, repo_root: Path) -> None:
    names = ("run", "runs", "prompt", "out", "hf", "resume", "dry", "name", "profile", "conf", "overrides")
    assert called(tmp_path, repo_root, "json=1", *(f"{name}={text}" for name in names)) == {
        "generate": [f"run={text}", "--prompt", text],
        "export": [f"run={text}", f"out={text}"],
        "verify": [f"hf={text}", "--json"],
        "eval": [f"run={text}", f"hf={text}", f"out={text}", "--json"],
        "train": ["--resume", text, "--dry-run"],
        "sweep": ["--json"],
        "report": [f"run={text}"],
        "compare": [f"out={text}", "--json"],
        "bench": [text, f"out={text}"],
        "doctor": ["--profile", f"out={text}", "--json"],
        "plan": [],
        "": [text, text, text],
    }


def test_what_is_not_given_is_no_argument(tmp_path: Path, repo_root: Path) -> None:
    assert called(tmp_path, repo_root) == {**{verb: [] for verb in VERBS}, "": ["", "", ""]}
