"""`headrace dashboard`: a local Ray head that stays; runs join it."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from headrace.platform.keys import hint
from headrace.storage.core.errors import InputError

USAGE = """\
usage: headrace dashboard [--stop | --status] [--json]

Starts Ray on this machine with its dashboard, once; runs without another address (cluster.address, RAY_ADDRESS)
join it, and their ranks can still be seen after they have ended.
  --status  say whether it is running
  --stop    end it, and no other Ray on this machine
"""
_FLAGS = ("--stop", "--status", "--json")


def run(argv: Sequence[str]) -> int:
    """Run `headrace dashboard ...`.

    Returns:
        0; 1 when --status finds none.

    Raises:
        InputError: an unknown word. MachineError: Ray did not start.
    """
    for word in argv:
        if word not in _FLAGS:
            raise InputError(f"unknown word {word!r}; {hint(word, _FLAGS)}")
    as_json = "--json" in argv
    if "--stop" in argv:
        return _stop(as_json=as_json)
    return _show(start="--status" not in argv, as_json=as_json)


def _stop(*, as_json: bool) -> int:
    from headrace.platform.control.head import stop_head

    was_up = stop_head()
    print(
        json.dumps({"stopped": was_up})
        if as_json
        else "the Ray head has ended"
        if was_up
        else "no Ray head was running"
    )
    return 0


def _show(*, start: bool, as_json: bool) -> int:
    from headrace.platform.control.auth_token import read_token, token_is_off, token_place
    from headrace.platform.control.head import find_head, start_head

    head = start_head() if start else find_head()
    if head is None:
        print(json.dumps({"up": False}) if as_json else "no Ray head is running; `headrace dashboard` starts one")
        return 1
    place = token_place()
    facts = {
        "up": True,
        "address": head.address,
        "dashboard_url": head.dashboard_url,
        "token": "off (RAY_AUTH_MODE=disabled)" if token_is_off() else place.words,
        "log": head.log,
    }
    if as_json:
        print(json.dumps(facts))
        return 0
    print(f"dashboard  {head.dashboard_url}")
    print(f"address    {head.address}  (runs of this user on this machine join it; `--stop` ends it)")
    print(f"token      {facts['token']}  (enter it once in the dashboard)")
    token = None if token_is_off() else read_token(place)
    if token is not None and sys.stdout.isatty():  # a secret belongs on a screen, not into a log file
        print(f"           {token}")
    print(f"log        {head.log}")
    return 0
