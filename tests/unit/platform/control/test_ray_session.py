"""A busy machine does not keep Ray from starting."""

from __future__ import annotations

import os

import pytest
from ray._private import services

from headrace.platform.control.ray_session import patience


@pytest.mark.parametrize(("load", "num_asked"), [(40.0 * (os.cpu_count() or 1), 4), (0.0, 1)], ids=["busy", "idle"])
def test_a_node_that_registers_late_is_waited_for_on_a_busy_machine(
    load: float, num_asked: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def get_node(address: str, node_id: str) -> str:
        asked.append((address, node_id))
        if len(asked) < 4:
            raise RuntimeError("No node found")
        return "here"

    monkeypatch.setattr(services, "get_node", get_node)
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))
    with patience():
        if load:
            assert services.get_node("head", "node") == "here"
        else:
            with pytest.raises(RuntimeError, match="No node found"):
                services.get_node("head", "node")
    assert asked == [("head", "node")] * num_asked
    assert services.get_node is get_node
