"""Every command in the README and in the pages of the site runs, in a short form.

A command is a line of a fenced block marked `sh`. The verbs run in one folder, which has what the pages talk about: a
run, a model folder, chats, a text. What takes long is shortened by SHORT; the long forms are soak tests. An HTML
comment above a block says what else is to be known: `<!-- run: exit 2 -->`, or `<!-- run: parsed, WHY -->` where
nothing here could run it.
"""

from __future__ import annotations

import functools
import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from headrace.platform.cli.main import VERBS, main
from headrace.platform.control.sweep import read_grid

ROOT = Path(__file__).resolve().parents[3]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs" / "pages").rglob("*.md")))
FIRST = 'make train overrides="run.dir=runs/my-run"'
TINY = ("debug=cpu_tiny", "cluster=inline")
# What is said behind a verb's own words. `--help` ends before anything is measured or served.
SHORT = {
    "train": ("--dry-run",),
    "eval": ("rows=1", "dtype=fp32"),
    "verify": ("seq_len=24",),
    "doctor": ("--help",),
    "dashboard": ("--help",),
    "mlflow": ("--help",),
    "monitor": ("--help",),
    "generate": ("max_new_tokens=4",),
}
# Programs of which only the words are looked at: they need a cluster, an image builder or a scheduler. What they train
# is planned.
ELSEWHERE = ("ray", "kubectl", "sbatch", "docker", "pip", "export")


@dataclass(frozen=True)
class Command:
    """A line of a page; `note` is what the comment above its block says."""

    page: Path
    line: int
    text: str
    note: str

    @property
    def where(self) -> str:
        """For people."""
        return f"{self.page.relative_to(ROOT)}:{self.line}: {self.text}"

    @property
    def is_only_parsed(self) -> bool:
        """Whether it needs what no test machine has."""
        return self.note.startswith("parsed, ") or self.words[0] in ELSEWHERE

    @property
    def exit_code(self) -> int:
        """What it ends with."""
        return int(self.note.removeprefix("exit ")) if self.note.startswith("exit ") else 0

    @functools.cached_property
    def words(self) -> list[str]:
        """As a shell reads them, without the comment behind them."""
        return shlex.split(self.text, comments=True)


@functools.cache
def commands(page: Path) -> tuple[Command, ...]:
    """Those of a page, a line that ends with a backslash joined with the next."""
    found, note, fence, begun = [], "", "", ""
    for number, line in enumerate(page.read_text().splitlines(), 1):
        if line.startswith("```"):
            fence = "" if fence else line[3:] or "text"
            note = note if fence else ""
        elif remark := re.fullmatch(r"<!-- run: (.+) -->", line):
            note = remark[1]
        elif fence == "sh" and line.strip() and not line.lstrip().startswith("#"):
            begun += line
            if begun.endswith("\\"):
                begun = begun[:-1]
                continue
            found.append(Command(page, number, begun, note))
            begun = ""
    return tuple(found)


@dataclass
class Site:
    """The folder in which the commands run."""

    folder: Path
    stub: Path
    ran: set[tuple[str, ...]] = field(default_factory=set)

    def verb(self, command: Command) -> tuple[list[str], dict[str, str]]:
        """The words that `headrace` gets and the variables that make sets; no words: make runs something else."""
        words = command.words
        if words[0] != "make":
            assert words[0] in ("headrace", ".venv/bin/headrace"), command.where
            return words[1:], {}
        got = self.folder.parent / "got"
        got.unlink(missing_ok=True)
        dry = [] if words[1] in VERBS else ["-n"]
        call = ["make", "-s", *dry, "-C", str(ROOT), f"VENV={self.stub}", *words[1:]]
        done = subprocess.run(call, capture_output=True, text=True, env={**os.environ, "GOT": str(got)}, check=False)
        assert done.returncode == 0, f"{command.where}\n{done.stderr}"
        if dry:
            return [], {}
        *argv, conf, overrides, runs = got.read_text().split("\0")[:-1]
        return argv, {"HEADRACE_CONF": conf, "HEADRACE_OVERRIDES": overrides, "HEADRACE_RUNS": runs}

    def call(self, argv: Sequence[str], env: dict[str, str], command: Command) -> None:
        """Run a verb here, unless another page has."""
        key = (*argv, *env.values())
        if key in self.ran:
            return
        self.ran.add(key)
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(self.folder)
            for name, value in env.items():
                patch.setenv(name, value)
            assert main(argv) == command.exit_code, command.where

    def short(self, command: Command) -> None:
        """Run the short form of a command."""
        if command.text == FIRST:
            return  # the fixture has run it
        if command.is_only_parsed:
            self.parse(command)
            return
        argv, env = self.verb(command)
        if not argv:
            return
        verb = argv[0]
        if verb == "bench":
            assert argv[1] in (ROOT / "tests/bench/cases/harness.py").read_text(), command.where
        elif verb == "sweep":
            for run in grid_of(argv, env):
                self.call(["train", *run, "--dry-run"], {}, command)
        elif "--live" not in argv:
            self.call([*argv, *SHORT.get(verb, ())], env, command)

    def parse(self, command: Command) -> None:
        """The repository's files that a command names are there, and a `headrace train` inside it can be planned."""
        words = command.words
        for word in words:
            if re.match(r"(scripts|docs)/", word):
                assert (ROOT / word).exists(), command.where
        inside = next((i for i, word in enumerate(words) if word == "train" or word.endswith("slurm.sh")), None)
        if inside is not None and not any("s3://" in word for word in words):
            own = [word for word in words[inside + 1 :] if not word.startswith("run.dir=")]
            self.call(["plan", *own], {}, command)


def grid_of(argv: Sequence[str], env: dict[str, str]) -> list[list[str]]:
    """The words of every run of a sweep."""
    words = [*shlex.split(env.get("HEADRACE_OVERRIDES", "")), *argv[1:]]
    return [list(run.words) for run in read_grid(words).runs]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    """A folder with runs/my-run, trained by the first command of start.md, and with all else that the pages name."""
    base = tmp_path_factory.mktemp("pages")
    site = Site(base / "here", base / "venv")
    (site.stub / "bin").mkdir(parents=True)
    (site.stub / ".headrace-ready").touch()
    program = site.stub / "bin" / "headrace"
    program.write_text(
        '#!/bin/sh\nprintf \'%s\\0\' "$@" "$HEADRACE_CONF" "$HEADRACE_OVERRIDES" "$HEADRACE_RUNS" > "$GOT"\n'
    )
    program.chmod(0o755)
    folder = site.folder
    (folder / "code").mkdir(parents=True)
    (folder / "code" / "part.py").write_text("x = [i * i for i in range(9)]\n" * 200)
    (folder / "book.txt").write_text("The water runs through the channel to the turbine.\n" * 200)
    turns = [{"role": "user", "content": "What do bees make?"}, {"role": "assistant", "content": "Bees make honey."}]
    (folder / "chats.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 50)
    (folder / "my.yaml").write_text("defaults:\n  - override /model: tiny\ntrain:\n  steps: 2\n")
    first = next(c for c in commands(ROOT / "docs/pages/start.md") if c.text == FIRST)
    argv, env = site.verb(first)
    site.call([*argv, *TINY], env, first)
    site.call(["export", "run=runs/my-run", "out=my-model"], {}, first)
    shutil.copytree(folder / "runs" / "my-run", folder / "runs" / "other-run")
    return site


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=lambda page: page.stem)
def test_the_commands_of_a_page_run_in_their_short_form(page: Path, site: Site) -> None:
    for command in commands(page):
        site.short(command)


@pytest.mark.soak
@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=lambda page: page.stem)
def test_the_training_commands_of_a_page_train(page: Path, site: Site, tmp_path: Path) -> None:
    """The long form: every `train` and `sweep` ends with a trained run, of a tiny model on this machine's CPUs."""
    for number, command in enumerate(commands(page)):
        if command.is_only_parsed or command.text == FIRST:
            continue
        argv, env = site.verb(command)
        if argv[:1] == ["data"]:
            site.short(command)
        elif argv[:1] == ["train"] and "--dry-run" not in argv:
            site.call([*argv, *long_form(argv, env, tmp_path / str(number))], env, command)
        elif argv[:1] == ["sweep"]:
            site.call([*argv, f"dir={tmp_path / str(number)}", "--", *TINY, "train.steps=2"], env, command)


def long_form(argv: Sequence[str], env: dict[str, str], folder: Path) -> list[str]:
    """What makes a training small enough for two cores; a resumed run takes no new folder."""
    if "--resume" in argv:
        return []  # the saved run is a tiny one already
    given = env["HEADRACE_OVERRIDES"]
    small = [f"run.dir={folder}", "train.steps=3", "hardware=cpu", "train.precision=fp32", "train.device=cpu"]
    if "init_from" in given:
        return [*small, "cluster=inline", "data.allow_no_stop=true", "data.seq_len=256", "train.micro_batches=1"]
    return [*small, *TINY, *(["data.seq_len=2048"] if "chunk" in given else []), "tiers.device.budget_gib=1"]
