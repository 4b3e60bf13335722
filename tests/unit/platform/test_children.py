"""Work in processes of their own: what they printed before they failed, hung or were killed counts."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from headrace.platform.children import Child, PartResult, find, run_part


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "some_parts.py").write_text(
        "import os, signal, subprocess, sys, time\n"
        "from headrace.platform.children import serve\n"
        "def good(word):\n"
        "    print('a library says hello'); yield {'what': 'a', 'word': word}; yield {'what': 'b'}\n"
        "def bad():\n"
        "    yield {'what': 'a'}; raise RuntimeError('the bearing is worn')\n"
        "def killed():\n"
        "    yield {'what': 'a'}; os.kill(os.getpid(), signal.SIGKILL)\n"
        "def hangs(pid_file):\n"
        "    yield {'what': 'a'}\n"
        "    child = subprocess.Popen(['sleep', '600']); open(pid_file, 'w').write(str(child.pid)); time.sleep(600)\n"
        "def score():\n"
        "    yield {'score': int(open('/proc/self/oom_score_adj').read())}\n"
        "serve({'good': good, 'bad': bad, 'killed': killed, 'hangs': hangs, 'score': score}, sys.argv[1:])\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return "some_parts"


def test_rows_come_in_order_and_noise_is_dropped(module: str) -> None:
    result = run_part(module, ["good", "wheel"], limit_s=600)
    assert result.rows == ({"what": "a", "word": "wheel"}, {"what": "b"})
    assert result.failure is None
    assert result.find(what="b") == {"what": "b"}
    assert result.find(what="c") is None


def test_a_failure_keeps_the_rows_before_it(module: str) -> None:
    result = run_part(module, ["bad"], limit_s=600)
    assert result.rows == ({"what": "a"},)
    assert result.failure == "exit code 1: RuntimeError: the bearing is worn"
    result = run_part(module, ["killed"], limit_s=600)
    assert result.rows == ({"what": "a"},)
    assert result.failure is not None
    assert result.failure.startswith("killed by SIGKILL")


def test_a_part_that_hangs_is_ended_with_its_children(module: str, tmp_path: Path) -> None:
    grandchild = tmp_path / "pid"
    with Child([sys.executable, "-m", module, "hangs", str(grandchild)], limit_s=600) as child:
        assert child.row() == {"what": "a"}
        while not grandchild.exists() or not grandchild.read_text():
            time.sleep(0.05)
        assert child.ask({}, 0.2) is None
        assert child.failure == "stopped after 0.2 s"
    assert ends(int(grandchild.read_text()))


def test_a_part_offers_itself_to_the_out_of_memory_killer(module: str) -> None:
    assert run_part(module, ["score"], limit_s=600).rows == ({"score": 1000},)


def ends(pid: int) -> bool:
    """Whether the process is gone, or a zombie that nobody has waited for, within a minute."""
    for _ in range(600):
        stat = Path(f"/proc/{pid}/stat")
        if not stat.exists() or stat.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            return True
        time.sleep(0.1)
    return False


def test_a_child_dies_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    code = "import sys; from headrace.platform.children import Child\n"
    code += "child = Child(['sleep', '600'], limit_s=600); print(child._process.pid, flush=True); next(child.rows())"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        os.kill(pid, 0)
        parent.kill()
    assert ends(pid)


def test_rows_come_while_the_child_runs_and_also_behind_an_unfinished_line(tmp_path: Path) -> None:
    code = "import os, sys, time; from headrace.platform.children import tell; sys.stderr.write('loading...')\n"
    code += "sys.stdout.write('50 %'); tell({'a': os.environ['WORD']}); time.sleep(600)"
    log = tmp_path / "log"
    with Child([sys.executable, "-c", code], limit_s=600, environment={"WORD": "wheel"}, log=log) as child:
        assert next(child.rows()) == {"a": "wheel"}
        assert child.failure is None
    assert list(child.rows()) == []
    assert "loading..." in log.read_text()
    assert "50 %" in log.read_text()


def test_questions_and_answers_each_with_a_limit() -> None:
    code = "import json, sys, time\nfor line in sys.stdin:\n    word = json.loads(line)['word']\n"
    code += "    if word == 'sleep': time.sleep(600)\n    print(json.dumps({'said': word}), flush=True)"
    with Child([sys.executable, "-S", "-c", code], limit_s=0) as child:
        assert child.ask({"word": "a"}, 600) == {"said": "a"}
        assert child.ask({"word": "b"}, 600) == {"said": "b"}
        assert child.ask({"word": "sleep"}, 0.2) is None
        assert child.failure == "stopped after 0.2 s"


def test_find_wants_all_values() -> None:
    rows = [{"a": 1, "b": 1}, {"a": 1, "b": 2}]
    assert find(rows, a=1, b=2) == rows[1]
    assert find(rows, a=2) is None
    assert PartResult(tuple(rows), None, 0.0).find(a=1) == rows[0]
