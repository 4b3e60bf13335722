"""The table of a blob's states, and a real stack against a simple model of it over random verbs."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headrace.helpers.tiers import FakeTier, Faults, open_fake_stack
from headrace.storage.core.errors import TierFull, TransferFailed
from headrace.storage.core.keys import BlobKey
from headrace.storage.core.records import LookupResult, Medium
from headrace.storage.core.states import FOUND_OUT, TRANSITIONS, BlobState, Verb, after
from headrace.storage.stack import TierStack
from headrace.storage.table import Row

KEYS = [BlobKey("test", layer, "x", 0, 1, 0) for layer in range(2)]
CALLERS = [verb for verb in Verb if verb not in FOUND_OUT]
PAGE, CAPACITY = 4096, 6 * 4096


def test_the_text_of_a_key_names_step_micro_batch_layer_tensor_span_and_owner() -> None:
    assert str(BlobKey("call2", 7, "gate", 1024, 2048, 3, 1)) == "s3.m1.l7.gate.t1024-2048.call2"
    assert str(BlobKey("adam", 7, "exp_avg", 0, 5)) == "m0.l7.exp_avg.t0-5.adam"
    parts = [["a", "b"], [0, 1], ["x", "y"], [0, 1], [2, 3], [None, 0, 1], [0, 1]]
    keys = [BlobKey(*values) for values in itertools.product(*parts)]
    assert len({str(key) for key in keys}) == len(set(keys)) == len(keys)


@pytest.mark.parametrize("state", BlobState, ids=lambda s: s.value)
@pytest.mark.parametrize("verb", Verb, ids=lambda v: v.value)
def test_what_the_table_does_not_have_is_refused_by_name(state: BlobState, verb: Verb) -> None:
    if (state, verb) in TRANSITIONS:
        assert after(KEYS[0], state, verb) is TRANSITIONS[state, verb]
        return
    error = KeyError if state is BlobState.absent else RuntimeError
    with pytest.raises(error, match=f"{KEYS[0]} is {state.value}: {verb.value} is not allowed, only "):
        after(KEYS[0], state, verb)


def test_every_state_can_be_reached_and_left() -> None:
    assert set(TRANSITIONS.values()) == set(BlobState)
    assert {state for state, _ in TRANSITIONS} == set(BlobState)


class Model:
    """What a key should hold: its state, the value that loads give, and the value that is there should a store fail."""

    def __init__(self) -> None:
        self.state = dict.fromkeys(KEYS, BlobState.absent)
        self.value: dict[BlobKey, torch.Tensor] = {}
        self.old: dict[BlobKey, torch.Tensor | None] = {}


class Walk:
    """Verbs on a stack whose writes may fail, and on the model."""

    def __init__(self) -> None:
        self.faults = Faults()
        self.stack = open_fake_stack([FakeTier(CAPACITY, self.faults)])
        self.model = Model()
        self.serial = 0
        self.given: dict[BlobKey, torch.Tensor | None] = {}

    def step(self, verb: Verb, key: BlobKey, choice: int) -> None:
        legal = (self.model.state[key], verb) in TRANSITIONS
        call = getattr(self, verb.value)
        if legal:
            call(key, choice)
        else:
            state = self.model.state[key]
            if (state, verb) == (BlobState.failed, Verb.prepare_load):
                with pytest.raises(TransferFailed, match=f"{key}.*Input/output error"):
                    self.plain(verb, key)
            else:
                with pytest.raises((KeyError, RuntimeError), match=f"{key} is {state.value}: {verb.value}"):
                    self.plain(verb, key)
        for each in KEYS:
            assert self.stack.state(each) is self.model.state[each], each
        assert (self.stack.lookup(key) is LookupResult.miss) >= (self.model.state[key] is BlobState.absent)

    def plain(self, verb: Verb, key: BlobKey) -> Any:
        if verb is Verb.prepare_store:
            return self.stack.prepare_store(key, torch.zeros(1), Medium.ssd)
        return getattr(self.stack, verb.value)(key)

    def turn(self, key: BlobKey, verb: Verb) -> None:
        self.model.state[key] = TRANSITIONS[self.model.state[key], verb]

    def prepare_store(self, key: BlobKey, choice: int) -> None:
        self.serial += 1
        value = torch.full((1 + choice % 3 * PAGE // 4,), float(self.serial))
        self.faults.failed_write = choice >= 24
        try:
            self.stack.prepare_store(key, value, Medium.ssd)
        except TierFull:
            return
        self.model.old[key] = self.model.value.get(key)
        self.model.value[key] = value
        self.turn(key, Verb.prepare_store)
        job = self.row(key).store
        assert job is not None
        job.job.wait()  # whether it failed is then known to the stack and to the model

    def complete_store(self, key: BlobKey, choice: int) -> None:
        if self.is_bad(key):
            with pytest.raises(TransferFailed, match=str(key)):
                self.stack.complete_store(key)
            return self.fall_back(key)
        self.stack.complete_store(key)
        self.model.old[key] = None
        return self.turn(key, Verb.complete_store)

    def prepare_load(self, key: BlobKey, choice: int) -> None:
        into = torch.empty_like(self.model.value[key]) if choice % 2 else None
        if self.is_bad(key):
            with pytest.raises(TransferFailed, match=str(key)):
                self.stack.prepare_load(key, into=into)
            return self.fall_back(key)
        self.stack.prepare_load(key, into=into)
        self.given[key] = into
        return self.turn(key, Verb.prepare_load)

    def complete_load(self, key: BlobKey, choice: int) -> None:
        found, into = self.stack.complete_load(key), self.given.pop(key)
        assert torch.equal(found, self.model.value[key])
        assert into is None or found.data_ptr() == into.data_ptr()
        self.turn(key, Verb.complete_load)

    def discard(self, key: BlobKey, choice: int) -> None:
        self.stack.discard(key)
        self.turn(key, Verb.discard)
        self.model.value.pop(key, None)

    def is_bad(self, key: BlobKey) -> bool:
        store = self.row(key).store
        return store is not None and store.job.error is not None

    def fall_back(self, key: BlobKey) -> None:
        self.turn(key, Verb.fail)
        old = self.model.old.pop(key)
        if old is not None:
            self.turn(key, Verb.fall_back)
            self.model.value[key] = old

    def row(self, key: BlobKey) -> Row:
        row = self.stack._table.find(key)
        assert row is not None
        return row

    def end(self) -> None:
        for key in KEYS:
            if self.model.state[key] is not BlobState.absent:
                self.stack.discard(key)
        for opened in self.stack._tiers.values():
            opened.threads.close()
            opened.ledger.check()
        assert self.stack.stats()[Medium.ssd].used_bytes == 0, "a slot is lost"
        self.stack.close()


STEPS = st.lists(st.tuples(st.sampled_from(CALLERS), st.sampled_from(KEYS), st.integers(0, 29)), max_size=60)


def run(steps: list[tuple[Verb, BlobKey, int]]) -> None:
    walk = Walk()
    for verb, key, choice in steps:
        walk.step(verb, key, choice)
    walk.end()


@given(steps=STEPS)
@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_a_stack_follows_the_table_over_random_verbs(steps: list[tuple[Verb, BlobKey, int]]) -> None:
    run(steps)


def lost_old(monkeypatch: pytest.MonkeyPatch) -> None:
    """A replacement gives the old slot back at once."""
    right = TierStack.prepare_store

    def prepare_store(self: TierStack, key: BlobKey, *args: Any, **kwargs: Any) -> None:
        right(self, key, *args, **kwargs)
        row = self._table.find(key)
        assert row is not None
        if row.replaces is not None:
            row.replaces.drop()
            row.replaces = None

    monkeypatch.setattr(TierStack, "prepare_store", prepare_store)


def kept_old(monkeypatch: pytest.MonkeyPatch) -> None:
    """A replaced blob keeps its slot for ever."""
    monkeypatch.setattr(Row, "drop", lambda self: None)


def lax_table(monkeypatch: pytest.MonkeyPatch) -> None:
    more = {**TRANSITIONS, (BlobState.storing, Verb.prepare_store): BlobState.storing}
    monkeypatch.setattr("headrace.storage.core.states.TRANSITIONS", more)


@pytest.mark.parametrize("fault", [lost_old, kept_old, lax_table])
def test_planted_faults_are_found(fault: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fault(monkeypatch)
    prefix = [(Verb.prepare_store, KEYS[0], 0), (Verb.complete_store, KEYS[0], 0)]
    failing = [(Verb.prepare_store, KEYS[0], 25), (Verb.complete_store, KEYS[0], 0), (Verb.prepare_load, KEYS[0], 0)]
    twice = [(Verb.prepare_store, KEYS[1], 0), (Verb.prepare_store, KEYS[1], 0)]
    with pytest.raises((AssertionError, KeyError, RuntimeError, pytest.fail.Exception)):
        run([*prefix, *prefix, *failing, (Verb.complete_load, KEYS[0], 0), *twice])
