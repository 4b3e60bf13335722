"""A group that was given up commits nothing, and leaves alone what the next one writes."""

from __future__ import annotations

from pathlib import Path

import pytest

from headrace.workers.train import group_mark
from headrace.workers.train.group_mark import GroupMark, GroupReplaced


def test_only_the_newest_group_passes(tmp_path: Path) -> None:
    first = GroupMark(tmp_path, 0)
    first.check()
    second = GroupMark(tmp_path, 1)
    second.check()
    with pytest.raises(GroupReplaced, match=r"this group \(attempt 0, .*another one has started since \(attempt 1, "):
        first.check()
    assert (first.is_newest(), second.is_newest()) == (False, True)
    again = GroupMark(tmp_path, 0)  # another driver resumes the run
    assert (second.is_newest(), again.is_newest()) == (False, True)


def test_a_disk_that_was_full_at_first_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(group_mark, "replace_durably", full)
        mark = GroupMark(tmp_path, 0)
        with pytest.raises(OSError, match="No space"):
            mark.check()
        assert not mark.is_newest()
    mark.check()
