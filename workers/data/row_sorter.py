"""Documents to rows of several lengths: each goes to the shortest row that holds it, and is not cut.

A row of L tokens has L + 1 columns and holds documents of up to L + 1 tokens, their end token included. Documents of
one length of row follow each other; one that does not fit into the rest of a row begins the next row, and the rest is
padding. A document that no row holds continues in the rows behind it, among the longest ones. A prompt and its
responses stand in one row; where no row holds all of them, the next rows hold the prompt again, with the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from headrace.workers.data.records import wrong
from headrace.workers.data.rows import RowWriter

Ids = npt.NDArray[np.int64]
Flags = npt.NDArray[np.uint8]
Tokens = tuple[Ids, Flags]


class RowSorter:
    """Writes documents, part by part, into the files of their lengths. With one length the parts follow each other.

    Args:
        folder: an existing folder.
        seq_len: of the only length, where there are no buckets.
        buckets: lengths of rows, ascending; empty: one length.
        vocab_size: token ids must be below it.
        padding_id: the token that fills rows.
        positions / padding: of every length, to continue from; empty starts again.

    Attributes:
        num_targets: tokens that count in the loss.
        padding: filling tokens of every length so far.

    Raises:
        MachineError: the disk is full or not writable.
    """

    def __init__(
        self,
        folder: Path,
        *,
        seq_len: int,
        buckets: Sequence[int],
        vocab_size: int,
        padding_id: int,
        positions: Sequence[int] = (),
        padding: Sequence[int] = (),
    ) -> None:
        self.folder, self.lengths = folder, tuple(buckets) or (seq_len,)
        self._sorts, self._padding_id = bool(buckets), padding_id
        self.padding = list(padding) or [0] * len(self.lengths)
        self._before = 0
        self._pending: list[tuple[Ids, Flags, str]] = []
        self._writers: list[RowWriter] = []
        for length, position in zip(self.lengths, positions or (0,) * len(self.lengths), strict=True):
            name = length if self._sorts else None
            self._writers.append(
                RowWriter(folder, seq_len=length, vocab_size=vocab_size, position=position, length=name)
            )

    @property
    def positions(self) -> list[int]:
        """Tokens written of every length, padding included."""
        return [writer.position for writer in self._writers]

    @property
    def num_tokens(self) -> int:
        """Tokens of documents that are written."""
        return sum(self.positions) - sum(self.padding)

    @property
    def num_rows(self) -> int:
        """Rows that are begun."""
        return sum(
            -(-writer.position // (length + 1)) for writer, length in zip(self._writers, self.lengths, strict=True)
        )

    @property
    def num_targets(self) -> int:
        """Tokens that count in the loss."""
        return self._before + sum(writer.num_targets for writer in self._writers)

    @num_targets.setter
    def num_targets(self, value: int) -> None:
        self._before = value - sum(writer.num_targets for writer in self._writers)

    @property
    def is_between_documents(self) -> bool:
        """Whether all that was added is written: then a journal may say so. A document that no row holds is written."""
        return not self._pending

    def add(self, ids: Ids, flags: Flags, *, where: str, starts: bool, ends: bool) -> None:
        """Add a part of a document; see RowWriter.append.

        Args:
            starts / ends: whether it is the first and the last part of its document.

        Raises:
            InputError: an id is not below the vocabulary size.
            MachineError: the disk is full.
        """
        if not self._sorts or not (starts or self._pending):
            # One length; or a document that no row holds goes on.
            self._writers[-1].append(ids, flags, where=where)
            return
        if starts:
            self._write_pending()  # of a document that was cut off by data.max_bytes
        self._pending.append((ids, flags, where))
        if ends or self._place() is None:
            self._write_pending()

    def add_responses(self, prompt: Tokens, responses: Sequence[Tokens], *, where: str) -> int:
        """Add responses to a prompt, in as few rows as hold them in this order.

        Returns:
            How often the prompt was written.

        Raises:
            InputError: the longest row does not hold the prompt and one response; an id is not below the vocabulary.
            MachineError: the disk is full.
        """
        self._write_pending()
        left, num_prompts = list(enumerate(responses)), 0
        while left:
            self._pending.append((*prompt, where))
            while left and self._num_pending() + left[0][1][0].size <= self.lengths[-1] + 1:
                self._pending.append((*left.pop(0)[1], where))
            if len(self._pending) == 1:
                number, (ids, _) = left[0]
                self._pending.clear()
                raise wrong(
                    f"{where}: the prompt and response {number} have {prompt[0].size + ids.size} tokens, and a row of "
                    f"data.seq_len={self.lengths[-1]} holds {self.lengths[-1] + 1}; raise data.seq_len, or set "
                    "data.share_prompts=false: then a row may cut them, as it cuts other documents"
                )
            self._write_pending()
            num_prompts += 1
        return num_prompts

    def _num_pending(self) -> int:
        return sum(ids.size for ids, _, _ in self._pending)

    def _place(self) -> int | None:
        """Which length holds what is pending."""
        fitting = (i for i, length in enumerate(self.lengths) if self._num_pending() <= length + 1)
        return next(fitting, None)

    def _write_pending(self) -> None:
        place = self._place()
        writer = self._writers[-1 if place is None else place]
        if place is not None and writer.room < self._num_pending():
            self.padding[place] += writer.fill_row(self._padding_id)
        for ids, flags, where in self._pending:
            writer.append(ids, flags, where=where)
        self._pending.clear()

    def flush(self) -> None:
        """Force what was written to the device, so that a journal may name it."""
        for writer in self._writers:
            writer.flush()

    def finish(self) -> list[int]:
        """Fill the last rows, write the headers and close. Returns the number of rows of every length."""
        self._write_pending()
        rows = []
        for place, writer in enumerate(self._writers):
            self.padding[place] += writer.room
            rows.append(writer.finish(self._padding_id))
        return rows

    def close(self) -> None:
        """Close the files as they are."""
        for writer in self._writers:
            writer.close()
