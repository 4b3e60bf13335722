"""Action lists: closed forms of bubbles and of what is in flight, random lists that drain, faults that are refused."""

from __future__ import annotations

import random
import time

import pytest

from headrace.storage.core.errors import InputError
from headrace.workers.parallel.config import INTERLEAVED, ONE_F_ONE_B, V_HALF, ZBV, PipelineSchedule, Vocabulary
from headrace.workers.parallel.pipeline.actions import EXTRA_IN_FLIGHT, Action, Op, Pipeline, default_chunks
from headrace.workers.parallel.pipeline.check import ScheduleError, check_lists
from headrace.workers.parallel.pipeline.schedules import Durations, Timeline, in_flight, simulate

# The durations of the note: forward 8, backward 16, S and T 4.
FORWARD, HALF, PASS = 8.0, 8.0, 4.0


def even(pipeline: Pipeline) -> Timeline:
    """The timeline of stages that are alike; a rank's stages together take the times above."""
    each = [time_s / pipeline.chunks for time_s in (FORWARD, HALF, HALF)]
    passes = {"scores": PASS, "vocabulary_grad": PASS} if pipeline.is_shared else {}
    return simulate(pipeline, Durations.even(pipeline, *each, **passes))


def random_pipeline(rng: random.Random) -> Pipeline:
    """Any shape up to 16 ranks, 64 micro-batches and 4 chunks."""
    schedule = rng.choice(list(PipelineSchedule))
    num_ranks = rng.randint(1, 16)
    chunks = rng.randint(2, 4) if schedule is INTERLEAVED else default_chunks(schedule)
    return Pipeline(schedule, num_ranks, rng.randint(num_ranks, 64), chunks, rng.choice(list(EXTRA_IN_FLIGHT)))


def random_durations(pipeline: Pipeline, rng: random.Random) -> Durations:
    """Stages that are not alike."""
    rows = [[rng.uniform(0.5, 2.0) for _ in range(pipeline.num_stages)] for _ in range(3)]
    return Durations(*rows, send=rng.uniform(0.0, 0.2), vocabulary={op: rng.uniform(0.0, 1.0) for op in Op})


def bubble(timeline: Timeline) -> float:
    """Share of the ranks' time in which they are idle."""
    busy = sum(map(sum, timeline.ends)) - sum(map(sum, timeline.starts))
    return 1.0 - busy / (len(timeline.lists) * timeline.seconds)


def drain_random(num_lists: int, rng: random.Random) -> float:
    """CPU seconds of the check, for so many lists of random pipelines."""
    seconds = 0.0
    while num_lists > 0:
        pipeline = random_pipeline(rng)
        lists = simulate(pipeline, random_durations(pipeline, rng)).lists
        begin_s = time.process_time()
        check_lists(pipeline, lists)
        seconds += time.process_time() - begin_s
        num_lists -= len(lists)
    return seconds


def test_random_lists_drain() -> None:
    drain_random(200, random.Random(0))


@pytest.mark.soak
def test_ten_thousand_random_lists_drain_in_30_s() -> None:
    assert drain_random(10_000, random.Random(1)) <= 30.0


@pytest.mark.parametrize("vocabulary", EXTRA_IN_FLIGHT)
@pytest.mark.parametrize("schedule", PipelineSchedule)
def test_small_pipelines_drain(schedule: PipelineSchedule, vocabulary: Vocabulary) -> None:
    for num_ranks in range(1, 6):
        for num_micro_batches in range(num_ranks, num_ranks + 4):
            pipeline = Pipeline(schedule, num_ranks, num_micro_batches, default_chunks(schedule), vocabulary)
            check_lists(pipeline, even(pipeline).lists)


@pytest.mark.parametrize(("num_ranks", "num_micro_batches"), [(1, 3), (2, 2), (4, 16), (8, 32)])
def test_bubble_of_1f1b(num_ranks: int, num_micro_batches: int) -> None:
    timeline = even(Pipeline(ONE_F_ONE_B, num_ranks, num_micro_batches))
    assert bubble(timeline) == pytest.approx((num_ranks - 1) / (num_micro_batches + num_ranks - 1), abs=1e-12)


@pytest.mark.parametrize("chunks", [2, 4])
def test_bubble_of_interleaved(chunks: int) -> None:
    """(p - 1) / (v m + p - 1): Narayanan et al. 2021, section 2.2."""
    timeline = even(Pipeline(INTERLEAVED, 4, 16, chunks))
    assert bubble(timeline) == pytest.approx(3 / (chunks * 16 + 3), abs=1e-12)


@pytest.mark.parametrize("num_ranks", [4, 8])
def test_bubble_with_a_shared_vocabulary(num_ranks: int) -> None:
    for vocabulary in (Vocabulary.vocab_1, Vocabulary.vocab_2):
        timeline = even(Pipeline(ONE_F_ONE_B, num_ranks, 4 * num_ranks, vocabulary=vocabulary))
        assert bubble(timeline) <= 1.05 * (num_ranks - 1) / (5 * num_ranks - 1)


@pytest.mark.parametrize("num_ranks", [4, 8])
def test_split_backward_has_a_smaller_bubble_than_1f1b(num_ranks: int) -> None:
    plain, split = (even(Pipeline(s, num_ranks, 4 * num_ranks, default_chunks(s))) for s in (ONE_F_ONE_B, ZBV))
    assert bubble(split) < 0.7 * bubble(plain)


@pytest.mark.parametrize("vocabulary", EXTRA_IN_FLIGHT)
@pytest.mark.parametrize("num_ranks", [2, 4, 8])
def test_micro_batches_in_flight(num_ranks: int, vocabulary: Vocabulary) -> None:
    timeline = even(Pipeline(ONE_F_ONE_B, num_ranks, 4 * num_ranks, vocabulary=vocabulary))
    extra = EXTRA_IN_FLIGHT[vocabulary]
    assert [in_flight(actions) for actions in timeline.lists] == [num_ranks - r + extra for r in range(num_ranks)]


@pytest.mark.parametrize("num_ranks", [4, 8])
def test_v_half_holds_half_of_1f1b(num_ranks: int) -> None:
    rng, pipeline = random.Random(num_ranks), Pipeline(V_HALF, num_ranks, 4 * num_ranks, 2)
    for durations in (Durations.even(pipeline, 1.0, 1.0, 1.0), random_durations(pipeline, rng)):
        lists = simulate(pipeline, durations).lists
        # A stage of v_half has half of the blocks of one of 1f1b, whose first rank holds num_ranks of them.
        assert max(map(in_flight, lists)) / 2 <= 0.55 * num_ranks


def test_zbv_holds_no_more_than_1f1b() -> None:
    timeline = even(Pipeline(ZBV, 4, 16, 2))
    assert max(map(in_flight, timeline.lists)) / 2 <= 4


def test_a_rank_does_one_thing_at_a_time_and_waits_for_its_inputs() -> None:
    rng = random.Random(3)
    for _ in range(5):
        pipeline = random_pipeline(rng)
        timeline = simulate(pipeline, random_durations(pipeline, rng))
        over: dict[Action, float] = {}
        for actions, ends in zip(timeline.lists, timeline.ends, strict=True):
            for action, end_s in zip(actions, ends, strict=True):
                over[action] = max(end_s, over.get(action, 0.0))
        for rank, (actions, starts, ends) in enumerate(
            zip(timeline.lists, timeline.starts, timeline.ends, strict=True)
        ):
            assert all(end_s <= start_s for end_s, start_s in zip(ends, starts[1:], strict=False))
            for action, start_s in zip(actions, starts, strict=True):
                assert all(over[wait] <= start_s for wait in pipeline.waits(rank, action))


def test_first_and_last_backward_of_a_stage_are_whole() -> None:
    pipeline = Pipeline(ZBV, 2, 5, 2)
    for rank, actions in enumerate(even(pipeline).lists):
        for stage in pipeline.stages_of(rank):
            ops = {a.micro_batch: a.op for a in actions if a.stage == stage and a.op in (Op.backward, Op.input_grad)}
            assert [ops[i] for i in range(5)] == [Op.backward, *[Op.input_grad] * 3, Op.backward]


def shared() -> tuple[Pipeline, list[list[Action]]]:
    pipeline = Pipeline(ONE_F_ONE_B, 4, 8, vocabulary=Vocabulary.vocab_2)
    return pipeline, [list(actions) for actions in even(pipeline).lists]


def test_a_swapped_pair_of_group_actions_is_refused() -> None:
    pipeline, lists = shared()
    one, other = (lists[2].index(Action(Op.scores, -1, i)) for i in (3, 4))
    lists[2][one], lists[2][other] = lists[2][other], lists[2][one]
    with pytest.raises(
        ScheduleError, match=r"rank 2 posts \[S, micro-batch 4\] where rank 0 posts \[S, micro-batch 3\]"
    ):
        check_lists(pipeline, lists)


def test_a_blocking_broadcast_is_refused_where_posting_is_not() -> None:
    """The last rank posts D before the backward that D's source waits for: safe only while D does not block."""
    pipeline, lists = shared()
    assert lists[3].index(Action(Op.embedding_grad, -1, 7)) < lists[3].index(pipeline.backward(3, 7))
    check_lists(pipeline, lists)
    with pytest.raises(ScheduleError, match=r"rank \d hangs at \["):
        check_lists(pipeline, lists, blocking={Op.embedding_grad})


@pytest.mark.parametrize("fault", ["lost", "twice", "before its input", "rank missing"])
def test_other_faults_are_refused(fault: str) -> None:
    pipeline, lists = shared()
    at = lists[1].index(Action(Op.forward, 1, 5))
    if fault == "lost":
        del lists[1][at]
    elif fault == "twice":
        lists[1].insert(at, lists[1][at])
    elif fault == "before its input":
        lists[1].insert(0, lists[1].pop(lists[1].index(pipeline.backward(1, 0))))
    else:
        del lists[3]
    with pytest.raises(ScheduleError):
        check_lists(pipeline, lists)


def test_shapes_that_no_schedule_takes_name_the_key() -> None:
    for schedule, chunks in ((ONE_F_ONE_B, 2), (INTERLEAVED, 1), (ZBV, 3), (V_HALF, 1)):
        with pytest.raises(InputError, match=r"parallel\.pipeline_chunks"):
            Pipeline(schedule, 4, 8, chunks)
    with pytest.raises(InputError, match=r"train\.micro_batches=3"):
        Pipeline(ONE_F_ONE_B, 4, 3)
    with pytest.raises(InputError, match=r"parallel\.vocabulary=auto"):
        Pipeline(ONE_F_ONE_B, 4, 4, vocabulary=Vocabulary.auto)
