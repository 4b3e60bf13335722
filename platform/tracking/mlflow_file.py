"""The SQLite file of an MLflow store: its address, and its making by one process at a time.

Imports mlflow when called.
"""

from __future__ import annotations

import logging
import os
import re
import sqlite3
from contextlib import closing
from pathlib import Path
from urllib.parse import unquote

from headrace.storage.core.errors import ErrorId, HeadraceError
from headrace.storage.core.locks import locked

# Making a store, or moving one to a newer MLflow's tables, takes seconds; on a busy machine, many.
MAKE_S = 120.0
STORE_FILE, ARTIFACTS_DIR = "mlflow.db", "mlflow_artifacts"
_URI = re.compile(r"sqlite(\+pysqlite)?:///(?P<path>[^?]*)")


def quiet_mlflow() -> None:
    """Import MLflow with our settings."""
    # Its own retries add up to minutes; ours go on in the background. No usage statistics are sent.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    import mlflow  # noqa: F401 - it sets the levels of its loggers

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)


def sqlite_uri(path: Path) -> str:
    """The address of a file, whatever its name.

    SQLAlchemy takes `?` for the begin of options and reads `%XX`. MLflow makes the folder that is named after
    `sqlite:///` without reading it; an address with such characters names the driver too, so that it does not.
    """
    text = str(path)
    escaped = text.replace("%", "%25").replace("?", "%3F")
    return f"sqlite:///{text}" if escaped == text else f"sqlite+pysqlite:///{escaped}"


def sqlite_path(uri: str) -> Path | None:
    """The file behind an address; None where it is no SQLite store."""
    found = _URI.match(uri)
    return Path(unquote(found["path"])) if found else None


def ready_store(path: Path, artifacts: str | None = None) -> None:
    """Make the tables of a store that is not there, and bring those of an older MLflow up to date.

    MLflow does both when it opens a store, without a lock: of two processes at once, one finds half of the tables and
    the store is broken for good. So a new store is made under another name and renamed when it is whole.

    Args:
        artifacts: URI of the folder of MLflow's own default experiment.

    Raises:
        OSError, sqlite3.Error: the file cannot be made, or is locked. HeadraceError: the store is damaged
            (mlflow_store_damaged), or of another MLflow; names the remedy.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path.with_name(f".{path.name}.lock"), MAKE_S):
        if path.is_file() and path.stat().st_size == 0:
            path.unlink()
        if path.exists():
            _check(path)
            _open(path, path, artifacts)
            return
        unfinished = path.with_name(f".{path.name}.unfinished")
        unfinished.unlink(missing_ok=True)
        _open(unfinished, path, artifacts)
        unfinished.rename(path)


def _check(path: Path) -> None:
    """Raise at once what a locked file, or one that cannot be opened, raises: MLflow itself tries for minutes."""
    try:
        with closing(sqlite3.connect(path, timeout=5.0)) as store:
            store.execute("PRAGMA schema_version").fetchone()
            tables = {name for (name,) in store.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            versions = list(store.execute("SELECT * FROM alembic_version")) if "alembic_version" in tables else []
    except sqlite3.OperationalError:
        raise
    except sqlite3.DatabaseError as error:
        raise _damaged(path, str(error)) from error
    if tables and len(versions) != 1:
        raise _damaged(path, "a process was stopped while it made the store")


def _open(path: Path, final: Path, artifacts: str | None) -> None:
    quiet_mlflow()
    from alembic.util import CommandError
    from mlflow.exceptions import MlflowException
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
    from sqlalchemy.exc import DatabaseError

    root = artifacts or (final.absolute().parent / ARTIFACTS_DIR).as_uri()
    try:
        SqlAlchemyStore(sqlite_uri(path), root).engine.dispose()
    except CommandError as error:  # a version that this MLflow does not know, and tables are missing
        raise _damaged(final, str(error)) from error
    except DatabaseError as error:
        # Steps of a migration that are there already, tables that it needs and are not, damaged pages.
        if re.search("already exists|duplicate column|no such (table|column)|malformed|not a database", str(error)):
            raise _damaged(final, str(error.orig)) from error
        raise
    except MlflowException as error:
        if "out-of-date" not in str(error):
            raise
        raise HeadraceError(
            f"{final} has the tables of another MLflow: copy the file, then bring it up to date with "
            f"`mlflow db upgrade '{sqlite_uri(final)}'`",
        ) from error


def _damaged(path: Path, why: str) -> HeadraceError:
    return HeadraceError(
        f"{path} is an incomplete MLflow store ({why}). Move it away; the next run makes a new one, and "
        "`headrace mlflow --send RUN` copies a run folder into it",
        id=ErrorId.mlflow_store_damaged,
    )
