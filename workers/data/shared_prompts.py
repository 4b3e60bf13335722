"""The tokens that sequences begin with alike, so that a prompt with several responses is there once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from headrace.workers.data.chat_targets import ChatTokens
from headrace.workers.data.records import wrong
from headrace.workers.data.rows import CONTINUES, STARTS, TARGET

Tokens = tuple[npt.NDArray[np.int64], npt.NDArray[np.uint8]]


def flagged(sequence: ChatTokens) -> Tokens:
    """Ids and flags of a document of its own."""
    flags = sequence.is_target.astype(np.uint8) * np.uint8(TARGET)
    flags[:1] |= STARTS
    return sequence.ids, flags


def share_prompt(sequences: Sequence[ChatTokens], where: str) -> tuple[Tokens, list[Tokens]]:
    """Ids and flags of what all sequences begin with, and of what each has behind it.

    The first target of every sequence and the token before it, which predicts it, are no part of what is shared.

    Raises:
        InputError: a sequence without a target.
    """
    for number, sequence in enumerate(sequences):
        if not sequence.is_target.any():
            raise wrong(f"{where}: response {number}: none of its tokens counts in the loss; leave it out")
    first = sequences[0].ids
    shared = min(max(0, int(sequence.is_target.argmax()) - 1) for sequence in sequences)
    for sequence in sequences[1:]:
        differ = np.flatnonzero(first[:shared] != sequence.ids[:shared])
        shared = int(differ[0]) if differ.size else shared
    prompt_flags = np.zeros(shared, dtype=np.uint8)
    prompt_flags[:1] |= STARTS
    responses = []
    for sequence in sequences:
        ids, flags = flagged(ChatTokens(sequence.ids[shared:], sequence.is_target[shared:], sequence.stops))
        if shared:
            flags[0] |= CONTINUES
        responses.append((ids, flags))
    return (first[:shared], prompt_flags), responses
