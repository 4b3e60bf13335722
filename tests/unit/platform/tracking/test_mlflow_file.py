"""The file of an MLflow store: made once, whatever its name and whoever else makes it; damage is named."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from headrace.helpers.tiers import has_id
from headrace.platform.tracking import mlflow_file
from headrace.platform.tracking.mlflow_file import ready_store, sqlite_path, sqlite_uri
from headrace.platform.tracking.mlflow_store import MlflowRun, MlflowSettings, default_store
from headrace.storage.core.errors import ErrorId, HeadraceError
from headrace.storage.core.locks import locked

pytestmark = pytest.mark.slow
NAMES = ["a b", "50%", "%41", "x#1", "what?now=1", "größe", "a'b;c", "a&b+c", "back\\slash", 'q"q', "[x]", "new\nline"]
OPEN = """
import sys
from headrace.platform.tracking.mlflow_store import MlflowRun, MlflowSettings
sys.stdin.readline()
print(MlflowRun.open(MlflowSettings(sys.argv[1], "exp", "one"), None).run_id)
"""


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A whole store: making one takes seconds."""
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    ready_store(path)
    return path.read_bytes()


@pytest.mark.parametrize("name", NAMES)
def test_an_address_means_its_file_whatever_the_name(name: str, template: bytes, tmp_path: Path) -> None:
    runs = tmp_path / name
    runs.mkdir()
    (runs / "mlflow.db").write_bytes(template)
    store = default_store(runs)
    assert sqlite_path(store) == runs / "mlflow.db"
    run = MlflowRun.open(MlflowSettings(store, "exp", "one", runs / "artifacts"), None)
    (runs / "note.txt").write_text("x")
    run.close("FINISHED", [runs / "note.txt"], {})
    with closing(sqlite3.connect(runs / "mlflow.db")) as file:
        assert file.execute("SELECT name, status FROM runs").fetchall() == [("one", "FINISHED")]
    assert len(list((runs / "artifacts").rglob("note.txt"))) == 1
    assert [path.name for path in tmp_path.iterdir()] == [name]  # and no folder of an address that was not read


def test_a_store_in_a_folder_of_any_name_is_made_there(tmp_path: Path) -> None:
    path = tmp_path / "is it 100%41?" / "mlflow.db"
    ready_store(path)
    assert {each.name for each in path.parent.iterdir()} == {"mlflow.db", ".mlflow.db.lock"}
    assert [each.name for each in tmp_path.iterdir()] == ["is it 100%41?"]


def test_addresses_of_other_stores_have_no_file() -> None:
    assert [sqlite_path(uri) for uri in ("http://127.0.0.1:5000", "postgresql://u@h/db", "runs/mlflow.db")] == [
        None
    ] * 3


def test_two_processes_make_one_store_at_once(tmp_path: Path) -> None:
    words = [sys.executable, "-c", OPEN, sqlite_uri(tmp_path / "mlflow.db")]
    children = [subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    for child in children:
        assert child.stdin is not None
        child.stdin.write("go\n")
        child.stdin.flush()
    said = [child.communicate()[0] for child in children]
    assert [child.returncode for child in children] == [0, 0]
    with closing(sqlite3.connect(tmp_path / "mlflow.db")) as file:
        assert {run for (run,) in file.execute("SELECT run_uuid FROM runs")} == {line.strip() for line in said}


@pytest.mark.parametrize("there", [False, True])
def test_a_store_waits_for_the_process_that_makes_it(
    there: bool, template: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "mlflow.db"
    if there:
        path.write_bytes(template)
    monkeypatch.setattr(mlflow_file, "MAKE_S", 0.05)
    with locked(tmp_path / ".mlflow.db.lock", 1.0), pytest.raises(TimeoutError):
        ready_store(path)


def test_what_a_killed_process_left_half_made_is_no_store(template: bytes, tmp_path: Path) -> None:
    (tmp_path / ".mlflow.db.unfinished").write_bytes(template[: len(template) // 2])
    (tmp_path / "mlflow.db").touch()
    ready_store(tmp_path / "mlflow.db")
    ready_store(tmp_path / "mlflow.db")
    assert {path.name for path in tmp_path.iterdir()} == {"mlflow.db", ".mlflow.db.lock"}


def run_sql(*lines: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        with closing(sqlite3.connect(path)) as store:
            for line in lines:
                store.execute(line)
            store.commit()

    return change


DAMAGES: dict[str, Callable[[Path], object]] = {
    "no database": lambda path: path.write_text("hello" * 400),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:20_000]),
    "no version": run_sql("DROP TABLE alembic_version"),
    "two versions": run_sql("INSERT INTO alembic_version VALUES ('451aebb31d03')"),
    "a migration that stopped": run_sql("UPDATE alembic_version SET version_num = '451aebb31d03'", "DROP TABLE spans"),
    "an unknown version": run_sql("UPDATE alembic_version SET version_num = 'ffffffffffff'", "DROP TABLE spans"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_broken_store_is_named_with_the_remedy_and_left_alone(damage: str, template: bytes, tmp_path: Path) -> None:
    path = tmp_path / "mlflow.db"
    path.write_bytes(template)
    DAMAGES[damage](path)
    before = path.read_bytes()
    with pytest.raises(HeadraceError, check=has_id(ErrorId.mlflow_store_damaged)) as refused:
        ready_store(path)
    assert str(path) in str(refused.value)
    assert "--send" in str(refused.value)
    assert path.read_bytes() == before or "migration" in damage


def test_tables_of_another_release_are_told_from_damage(template: bytes, tmp_path: Path) -> None:
    path = tmp_path / "mlflow.db"
    path.write_bytes(template)
    run_sql("UPDATE alembic_version SET version_num = '451aebb31d03'")(path)
    with pytest.raises(HeadraceError, check=has_id(ErrorId.failed)) as refused:
        ready_store(path)
    assert f"mlflow db upgrade '{sqlite_uri(path)}'" in str(refused.value)
