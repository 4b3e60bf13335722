"""The tokens of a rendered chat that count in the loss: what the assistant wrote, and a token that stops it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from tokenizers import Encoding

from headrace.workers.data.chat import RenderedChat


@dataclass(frozen=True)
class TurnEnds:
    """Token ids that end a turn.

    Args:
        end_id: ends a document. stops: generation stops at these; `end_id` is one of them.
        added: tokens beside the tokenizer's model, flagged special or not; a turn's last word closes it if it is one.
    """

    end_id: int
    stops: frozenset[int]
    added: frozenset[int]


@dataclass(frozen=True)
class ChatTokens:
    """Ids (n,) and whether they are targets (n,); the last id ends the document.

    `stops`: behind the assistant's last turn a token that closes it is a target.
    """

    ids: npt.NDArray[np.int64]
    is_target: npt.NDArray[np.bool_]
    stops: bool


def chat_tokens(encoding: Encoding, chat: RenderedChat, ends: TurnEnds, *, ends_with_answer: bool) -> ChatTokens:
    """Find the targets among the tokens of a chat.

    White space that a template writes behind the closing token of a turn is no target, unless the template's own
    `{% generation %}` block holds it. After the last turn a stop token is a target: the one that the template writes,
    else the end of the document. So no target stops the assistant only where the template writes something else there.

    Args:
        encoding: of `chat.text`.
        ends_with_answer: the last message is the assistant's.
    """
    ids = [*encoding.ids]
    offsets = np.maximum.accumulate(np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2), axis=0)
    is_target = np.zeros(len(ids) + 1, dtype=bool)
    is_word = [bool(chat.text[begin:end].strip()) for begin, end in encoding.offsets]
    closers, word, closed = ends.stops | ends.added, -1, False
    for begin, end in chat.targets:
        first = int(np.searchsorted(offsets[:, 1], begin, side="right"))
        last = int(np.searchsorted(offsets[:, 0], end, side="left"))
        word = last - 1
        while word > first and not is_word[word]:
            word -= 1
        closed = first <= word and ids[word] in closers
        is_target[first : word + 1 if closed and not chat.exact else last] = True
    while ends_with_answer and chat.targets and ids[word] not in ends.stops:
        behind = next((i for i in range(word + 1, len(ids)) if is_word[i]), len(ids))
        if behind == len(ids):
            ids.append(ends.end_id)
            is_word.append(True)
        elif ids[behind] not in (ends.stops if closed or not chat.exact else closers):
            break
        is_target[word + 1 : behind + 1] = True
        word, closed = behind, True
    if ids[-1:] != [ends.end_id]:
        ids.append(ends.end_id)
    return ChatTokens(np.array(ids, dtype=np.int64), is_target[: len(ids)], closed)
