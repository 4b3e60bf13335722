"""Errors keep their id on the way through a process border, and the list of ids stays in order."""

from __future__ import annotations

import pickle

from headrace.storage.core.errors import ErrorId, HeadraceError, InputError, TierFull


def test_an_error_has_its_own_id_or_that_of_its_class() -> None:
    assert InputError("no such key").id is ErrorId.input_wrong
    assert InputError("no such key", id=ErrorId.failed).id is ErrorId.failed
    assert TierFull("no room").id is ErrorId.tier_full


def test_the_id_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(InputError("no such key", id=ErrorId.tier_full)))
    assert (type(error), str(error), error.id) == (InputError, "no such key", ErrorId.tier_full)


def test_every_class_has_an_id_and_ids_are_in_order() -> None:
    assert list(ErrorId) == sorted(ErrorId)
    assert all(isinstance(kind.id, ErrorId) for kind in HeadraceError.__subclasses__())
