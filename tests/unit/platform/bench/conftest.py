"""A fio that answers at once, and slab notes in the test's folder."""

from __future__ import annotations

import json
import stat
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

# Says that it moved what it was told to, in the time that its environment gives; writes its words to a file.
FAKE_FIO = f"""#!{sys.executable}
import json, os, sys
if sys.argv[1] == "--version":
    print("fio-fake")
elif sys.argv[1] == "--enghelp":
    print("Available IO engines:\\n\\tpsync\\n\\t" + os.environ.get("FAKE_ENGINE", "libaio"))
else:
    words = dict(word[2:].partition("=")[::2] for word in sys.argv[1:])
    with open(os.environ["FAKE_LOG"], "a") as log:
        log.write(json.dumps(words) + "\\n")
    moved = int(words["size"]) * int(words.get("numjobs", 1)) - int(os.environ.get("FAKE_LOST", 0))
    setting = words["ioengine"] + (" huge" if "iomem" in words else "")
    if setting in os.environ.get("FAKE_REFUSED", "").split(","):
        sys.exit("fio: no room in huge pages")
    side = {{"io_bytes": moved, "runtime": 5 if setting == os.environ.get("FAKE_FAST") else 10}}
    job = {{"read": side, "write": side, "usr_cpu": 10.0, "sys_cpu": 40.0, "job_runtime": 10}}
    print("note: fio prints such lines\\n" + json.dumps({{"jobs": [job]}}))
"""


@pytest.fixture(autouse=True)
def own_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Notes about slab files go to the test's folder, not to the user's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def fake_fio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The path of a program that answers as fio does."""
    path = tmp_path / "fake" / "fio"
    path.parent.mkdir()
    path.write_text(FAKE_FIO)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("FAKE_LOG", str(tmp_path / "fio.log"))
    return str(path)


@pytest.fixture
def words_of_fio(tmp_path: Path) -> Callable[[], list[dict[str, str]]]:
    """Reads what the program was told, call by call."""
    return lambda: [json.loads(line) for line in (tmp_path / "fio.log").read_text().splitlines()]
