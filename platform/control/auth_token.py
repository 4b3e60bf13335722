"""Ray's token: who may use a cluster. No Ray.

Current Ray protects a cluster by a shared secret: RAY_AUTH_TOKEN, else the file RAY_AUTH_TOKEN_PATH, else
~/.ray/auth_token. Anyone who has it can run code on the cluster. Ray makes the file readable by all; we do not.
"""

from __future__ import annotations

import errno
import importlib
import os
import secrets
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from headrace.storage.core.errors import MachineError

MODE, TOKEN, TOKEN_PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"


@dataclass(frozen=True)
class TokenPlace:
    """Where the token is, in words, and the file, where it is in one; `there` says whether it exists."""

    words: str
    path: Path | None
    there: bool


def token_place(environ: Mapping[str, str] = os.environ, home: Path | None = None) -> TokenPlace:
    """Where this user's Ray looks for its token."""
    if environ.get(TOKEN):
        return TokenPlace(f"the variable {TOKEN}", None, True)
    if environ.get(TOKEN_PATH):
        path = Path(environ[TOKEN_PATH])
        return TokenPlace(f"{path} ({TOKEN_PATH})", path, path.is_file())
    path = (home or Path(os.path.expanduser("~"))) / ".ray" / "auth_token"
    return TokenPlace(str(path), path, os.access(path, os.R_OK))


def token_is_off(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether the user has switched tokens off."""
    return environ.get(MODE, "").lower() == "disabled"


def ensure_token(*, keep: bool = True) -> TokenPlace:
    """Make a token where there is none, readable by its user alone, and switch this process to tokens.

    Args:
        keep: the token must outlive this process. Otherwise a token that cannot be written to its file, as where HOME
            is read-only, is kept in this process's environment, and the words say so.

    Raises:
        MachineError: the file cannot be written.
    """
    place = token_place()
    if token_is_off():
        return place
    if place.path is not None and not place.there:
        try:
            _make(place.path)
            place = token_place()
        except OSError as error:
            why = f"{place.words} cannot be written: {error.strerror or error}"
            if keep:
                raise MachineError(f"Ray's token: {why}. Set HOME to a folder of yours, or RAY_AUTH_TOKEN") from error
            os.environ[TOKEN] = secrets.token_hex(32)
            place = TokenPlace(f"made for this run alone, in its variable {TOKEN} ({why})", None, True)
    _switch_on()
    return place


def _make(path: Path) -> None:
    if not path.is_absolute():
        raise FileNotFoundError(errno.ENOENT, "there is no home folder", str(path))
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        if os.access(path, os.R_OK):
            return  # another run was quicker
        raise
    with os.fdopen(fd, "w") as file:
        file.write(secrets.token_hex(32))


def use_token_if_there() -> TokenPlace:
    """Present this user's token to a cluster, where there is one."""
    place = token_place()
    if place.there:
        _switch_on()
    return place


def _switch_on() -> None:
    """Ray reads the mode when it is imported: where that has happened, it must hear of it in its own way."""
    if os.environ.get(MODE) is None and "ray" in sys.modules:
        setup = importlib.import_module("ray._private.authentication.authentication_token_setup")
        setup.maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
    os.environ.setdefault(MODE, "token")


def read_token(place: TokenPlace) -> str | None:
    """The token itself."""
    if place.path is None:
        return os.environ.get(TOKEN)
    return place.path.read_text().strip() if place.there else None
