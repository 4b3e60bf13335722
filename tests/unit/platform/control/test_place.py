"""What a person reads about where the ranks run."""

from __future__ import annotations

from headrace.platform.control.launch import place


def test_ray_that_was_started_for_the_run():
    facts = {"launcher": "ray", "num_ranks": 2, "device": "cpu", "nodes": ["10.0.0.1"], "address": "10.0.0.1:6379"}
    facts |= {"dashboard_url": "http://127.0.0.1:8265", "ray_started_by_run": True}
    words = place(facts)
    assert words == (
        "2 rank(s) on cpu, 1 node(s); Ray at 10.0.0.1:6379, started for this run; dashboard http://127.0.0.1:8265"
    )
    assert place({**facts, "ray_token": "/home/me/.ray/auth_token"}) == (
        f"{words} (enter the token once: /home/me/.ray/auth_token)"
    )
    assert place({**facts, "ray_token": None}) == words


def test_ray_that_was_there():
    facts = {"launcher": "ray", "num_ranks": 16, "device": "cuda", "nodes": ["a", "b"], "address": "a:6379"}
    assert place(facts) == "16 rank(s) on cuda, 2 node(s); Ray at a:6379, joined"


def test_without_ray():
    assert (
        place({"launcher": "inline", "num_ranks": 1, "dashboard_url": None})
        == "1 rank(s) on this machine, in plain processes"
    )
