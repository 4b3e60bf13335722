"""Children, turns and rows of `headrace bench kernels`, with a child that answers from a script."""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from headrace.bench.kernel_case import Case
from headrace.bench.kernel_rounds import Found, Workshop, in_groups, row_of

# Answers as kernel_child does; a case's contender says how it behaves.
FAKE_CHILD = """
import json, os, sys, time
ready = set()
print("noise on standard output")
for line in sys.stdin:
    words = json.loads(line)
    print(os.environ.get("FAKE", "-"), line.strip(), file=open(os.environ["FAKE_LOG"], "a"))
    name = words.get("name") or words.get("case", {}).get("contender", "")
    how = name.rsplit("/", 1)[-1]
    if how == "slow":
        time.sleep(60)
    if how == "dies" and words["do"] == "round":
        sys.exit("the device caught fire")
    answer = {"numbers": {"forward_ms": 1.0, "backward_ms": None, "total_ms": float(len(ready))}}
    if how == "missing":
        answer = {"error": "not installed"}
    elif words["do"] == "prepare":
        ready.add(how)
        answer = {"numbers": {"extra_mib": None}, "facts": {"package": how}}
    elif words["do"] == "round" and how not in ready:
        answer = {"error": f"{how} is not ready in this process"}
    elif words["do"] == "drop":
        ready.clear()
        answer = {}
    print(json.dumps(answer), flush=True)
"""


def case(contender: str, family: str = "one", **more: Any) -> Case:
    return Case("loss", "small", contender, family, {"tokens": 2}, "cpu", "float32", **more)


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FAKE_LOG", str(tmp_path / "log"))
    return tmp_path / "log"


@pytest.fixture
def start(tmp_path: Path, log: Path) -> Sequence[str]:
    script = tmp_path / "child.py"
    script.write_text(textwrap.dedent(FAKE_CHILD))
    return (sys.executable, "-S", str(script))


def measured(start: Sequence[str], cases: Sequence[Case], rounds: int = 2) -> dict[str, Found]:
    with Workshop(5.0, start) as workshop:
        found = workshop.measure(cases, rounds)
    return {name.rsplit("/", 1)[-1]: one for name, one in found.items()}


def requests(log: Path) -> list[tuple[str, str]]:
    found = []
    for line in log.read_text().splitlines():
        words = json.loads(line.partition(" ")[2])
        found.append((words["do"], words.get("name", words.get("case", {}).get("contender", "")).rsplit("/", 1)[-1]))
    return found


def test_cases_take_turns_and_the_first_one_moves_on(start: Sequence[str], log: Path) -> None:
    found = measured(start, [case("a"), case("b"), case("c")], rounds=2)
    done = requests(log)
    assert done[:3] == [("prepare", "a"), ("prepare", "b"), ("prepare", "c")]
    assert done[3:] == [("round", name) for name in "abcbca"] + [("drop", "")]
    assert all(len(one.rounds) == 2 and one.error is None for one in found.values())


def test_a_missing_contender_costs_its_own_row(start: Sequence[str], log: Path) -> None:
    found = measured(start, [case("missing"), case("b")])
    assert found["missing"].error == "not installed"
    assert len(found["b"].rounds) == 2
    assert ("round", "missing") not in requests(log)
    row = row_of(case("missing"), found["missing"])
    assert (row.name, row.error) == ("loss/small/missing", "not installed")


def test_a_child_that_dies_takes_no_other_case_with_it(start: Sequence[str], log: Path) -> None:
    found = measured(start, [case("dies"), case("b"), case("other", "two")], rounds=3)
    assert found["dies"].error == "exit code 1: the device caught fire"
    assert [len(found[name].rounds) for name in ("b", "other")] == [3, 3]
    assert requests(log).count(("prepare", "b")) == 2, "made ready again in a new process"


def test_a_slow_case_is_stopped(start: Sequence[str], log: Path) -> None:
    with Workshop(0.5, start) as workshop:
        found = workshop.measure([case("slow"), case("b")], 1)
    assert found["loss/small/slow"].error == "stopped after 0.5 s"
    assert len(found["loss/small/b"].rounds) == 1


def test_a_family_has_its_environment(start: Sequence[str], log: Path) -> None:
    measured(start, [case("a", environment={"FAKE": "yes"}), case("b", "two")], rounds=1)
    lines = log.read_text().splitlines()
    assert all(line.startswith("yes") == ('"a"' in line or "/a" in line) for line in lines if "drop" not in line)


def test_a_program_that_cannot_start_says_why(log: Path) -> None:
    found = measured([sys.executable, "-c", "raise SystemExit('no such thing')"], [case("a")])
    assert found["a"].error == "exit code 1: no such thing"


def test_a_row_has_medians_and_every_total() -> None:
    totals = (3.0, 1.0, 2.0)
    rounds: list[dict[str, float | int | None]] = [
        {"forward_ms": 1.0, "backward_ms": None, "total_ms": total} for total in totals
    ]
    row = row_of(case("a"), Found({"extra_mib": None}, {"package": "a"}, rounds))
    assert row.numbers == {
        "extra_mib": None,
        "forward_ms": 1.0,
        "backward_ms": None,
        "total_ms": 2.0,
        "total_ms_min": 1.0,
        "total_ms_max": 3.0,
        "rounds": 3,
    }
    assert row.config["total_ms_each"] == [3.0, 1.0, 2.0]
    assert row.config["package"] == "a"
    assert "not measured" in row.config["memory"]


def test_groups_keep_their_order() -> None:
    cases = [case("a"), Case("loss", "large", "a", "one", {}, "cpu", "float32"), case("b")]
    assert [[one.name for one in group] for group in in_groups(cases)] == [
        ["loss/small/a", "loss/small/b"],
        ["loss/large/a"],
    ]


def test_a_case_survives_its_trip() -> None:
    there = case("a", options={"axis": "tokens"}, environment={"X": "1"}, tolerance="linear_cross_entropy")
    assert Case.from_json(json.loads(json.dumps(there.to_json()))) == there
