"""Which group of a run may write its checkpoints: the newest that has started. One small file in the run folder.

A group whose driver has given it up may still run, on nodes that the driver does not reach and that reach the run
folder. It must neither commit a checkpoint nor remove what the group in its place writes.
"""

from __future__ import annotations

import uuid
from contextlib import suppress
from pathlib import Path

from headrace.storage.core.durable import replace_durably
from headrace.storage.core.errors import HeadraceError

FILE = "newest_group.txt"


class GroupReplaced(HeadraceError):
    """Another group of the run has started since."""


class GroupMark:
    """The mark of one group; for rank 0. A disk that does not take it at first is asked again by `check`."""

    def __init__(self, run_dir: Path, attempt: int) -> None:
        self._path = run_dir / "ranks" / FILE
        self._content = f"attempt {attempt}, {uuid.uuid4().hex}\n".encode()
        self._is_set = False
        with suppress(OSError):
            self._set()

    def is_newest(self) -> bool:
        """Whether `check` refuses nothing."""
        try:
            self.check()
        except (GroupReplaced, OSError):
            return False
        return True

    def check(self) -> None:
        """Refuse to go on for a group that is not the newest.

        Raises:
            GroupReplaced: it is not; names both. OSError: the file cannot be written or read.
        """
        if not self._is_set:
            self._set()
        if (there := self._path.read_bytes()) != self._content:
            ours, theirs = (each.decode(errors="replace").strip() for each in (self._content, there))
            raise GroupReplaced(f"this group ({ours}) was given up: another one has started since ({theirs})")

    def _set(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        replace_durably(self._path, self._content)
        self._is_set = True
