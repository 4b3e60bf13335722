"""Whether action lists can be run: they are drained, without torch, before a rank starts.

Posting never blocks; a wait is over when all that it waits for is posted or done. A group action that blocks where it
stands (a rendezvous) can be declared, as lists that are safe with posting may hang with it.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Sequence

from headrace.storage.core.errors import HeadraceError
from headrace.workers.parallel.pipeline.actions import Action, Op, Pipeline

Lists = Sequence[Sequence[Action]]


class ScheduleError(HeadraceError):
    """Action lists that no executor may start: a fault of the schedule, not of the user."""


def check_lists(pipeline: Pipeline, lists: Lists, *, blocking: Collection[Op] = ()) -> None:
    """Refuse lists that lack an action, have one twice, differ in the order of group actions, or hang.

    Args:
        lists: of every rank.
        blocking: group actions that return only when all ranks have come to them.

    Raises:
        ScheduleError: names the rank, its next action and what that waits for.
    """
    if len(lists) != pipeline.num_ranks:
        raise ScheduleError(f"{len(lists)} action lists for {pipeline.num_ranks} ranks")
    for rank, actions in enumerate(lists):
        wanted = set(pipeline.actions(rank))
        if len(actions) != len(wanted) or wanted != set(actions):
            found = Counter(actions)
            action = next(a for a in (*wanted, *found) if found[a] != (a in wanted))
            raise ScheduleError(f"rank {rank} has {found[action]} x [{action}], not {int(action in wanted)}")
    groups = [[action for action in actions if action.op in pipeline.group_ops] for actions in lists]
    for rank, own in enumerate(groups):
        for first, other in zip(groups[0], own, strict=True):
            if first != other:
                raise ScheduleError(f"rank {rank} posts [{other}] where rank 0 posts [{first}]: one order for all")
    drain(pipeline, lists, blocking)


def drain(pipeline: Pipeline, lists: Lists, blocking: Collection[Op] = ()) -> None:
    """Run the lists without work, until all are empty.

    Raises:
        ScheduleError: some are not empty and every rank waits; names the rank, its next action and its wait.
    """
    over: set[Action] = set()
    posted: Counter[Action] = Counter()
    waiting: defaultdict[Action, list[int]] = defaultdict(list)
    at, entered = [0] * len(lists), [False] * len(lists)
    group_ops, num_ranks, waits = pipeline.group_ops, pipeline.num_ranks, pipeline.waits
    ready = list(range(len(lists)))
    while ready:
        rank = ready.pop()
        actions = lists[rank]
        while at[rank] < len(actions):
            action = actions[at[rank]]
            lacks = None
            if not entered[rank]:
                for wait in waits(rank, action):
                    if wait not in over:
                        lacks = wait
                        break
            if lacks is None and action.op in group_ops:
                if not entered[rank]:
                    posted[action] += 1
                    if posted[action] == num_ranks:
                        over.add(action)
                        ready += waiting.pop(action, ())
                entered[rank] = action.op in blocking and action not in over
                lacks = action if entered[rank] else None
            elif lacks is None:
                over.add(action)
                ready += waiting.pop(action, ())
            if lacks is not None:
                waiting[lacks].append(rank)
                break
            at[rank] += 1
    for rank, actions in enumerate(lists):
        if at[rank] < len(actions):
            action = actions[at[rank]]
            lacks = action if entered[rank] else next(a for a in waits(rank, action) if a not in over)
            raise ScheduleError(f"rank {rank} hangs at [{action}]: it waits for [{lacks}], which never ends")
