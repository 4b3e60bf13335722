"""The kernels beside their plain forms, torch.compile and other projects' kernels: memory, forward, backward, total.

Every case of a group (one operator at one shape) takes its turn in every round of one run, in child processes by family
(kernel_rounds.py); a figure is the median over the rounds. A contender that is missing or fails is a row with the
reason. Every result and gradient is compared with an oracle in a wider dtype, ours and others alike.

    loss        kernel_loss.py       heads of published models; limits and targets in kernel_targets.py
    attention   kernel_attention.py  streaming over resident blocks beside the stock operator on everything
    block       kernel_block.py      norms, rotary positions, gated units
    codec       kernel_codec.py      what encode and decode take

On the CPU small shapes and reference forms run: rows that show that the command works, judged by no target.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from headrace.bench import (
    kernel_attention,
    kernel_block,
    kernel_codec,
    kernel_loss,
    kernel_targets,
)
from headrace.bench.harness import OptionValue, Row
from headrace.bench.kernel_case import Case
from headrace.bench.kernel_rounds import TOO_LATE, Workshop, in_groups, row_of
from headrace.bench.kernel_settings import DEFAULTS, Settings, read_settings
from headrace.platform.keys import pick

DESCRIPTION = (
    "memory, forward and backward of the kernels, compared with torch.compile, Liger, CCE, QuACK and plain torch"
)
OPTIONS: Mapping[str, OptionValue] = DEFAULTS
Rows = dict[str, Row]


@dataclass(frozen=True)
class Part:
    """A part of the benchmark.

    Args:
        cases: what to measure.
        finish: rows of one group by contender -> the rows to record, with ratios and targets.
    """

    cases: Callable[[Settings], list[Case]]
    finish: Callable[[Settings, Sequence[Case], Rows], Iterator[Row]]


def run(options: Mapping[str, OptionValue]) -> Iterator[Row]:
    """A row per case, and the targets after each group.

    Raises:
        InputError: an option makes no sense here.
    """
    settings = read_settings(options)
    until_s = time.monotonic() + settings.limit_s
    todo = _wanted(settings, [(PARTS[part], PARTS[part].cases(settings)) for part in settings.parts])
    with Workshop(settings.case_limit_s) as workshop:
        workshop.start([case for _, cases in todo for case in cases])
        for part, cases in todo:
            for group in in_groups(cases):
                if time.monotonic() > until_s:
                    yield Row(group[0].group, error=TOO_LATE)
                    continue
                found = workshop.measure(group, settings.rounds)
                rows = {case.contender: row_of(case, found[case.name]) for case in group}
                yield from part.finish(settings, group, rows)
    if not settings.on_cuda and settings.contenders is None:
        left_out = kernel_loss.LEFT_OUT_ON_CPU
        yield Row("left_out_on_cpu", {"contenders": len(left_out)}, dict(left_out))


def _wanted(settings: Settings, todo: Sequence[tuple[Part, list[Case]]]) -> list[tuple[Part, list[Case]]]:
    """The cases of the contenders asked for, and the baselines that the others are compared with."""
    if settings.contenders is None:
        return list(todo)
    known = sorted({case.contender for _, cases in todo for case in cases})
    names = {pick("contenders", word, known) for word in settings.contenders} | {"copy", "stock"}
    return [(part, [case for case in cases if case.contender in names or case.is_limit]) for part, cases in todo]


def _finish_loss(settings: Settings, group: Sequence[Case], rows: Rows) -> Iterator[Row]:
    for case in group:
        yield kernel_targets.with_agreement(case, rows[case.contender])
    judged = settings.on_cuda
    yield from kernel_targets.loss_targets(group[0].shape_name, group[0].shape, rows, judged=judged)


def _finish_attention(settings: Settings, group: Sequence[Case], rows: Rows) -> Iterator[Row]:
    for case in group:
        yield kernel_targets.with_agreement(case, rows[case.contender])
    yield from kernel_targets.attention_targets(group[0].shape_name, rows, judged=settings.on_cuda)


def _finish_by_copy(settings: Settings, group: Sequence[Case], rows: Rows) -> Iterator[Row]:
    shares = kernel_targets.share_of_copy(rows)
    for case in group:
        yield kernel_targets.with_agreement(case, shares[case.contender])


PARTS: dict[str, Part] = {
    "loss": Part(kernel_loss.cases, _finish_loss),
    "attention": Part(kernel_attention.cases, _finish_attention),
    "block": Part(kernel_block.cases, _finish_by_copy),
    "codec": Part(kernel_codec.cases, _finish_by_copy),
}
