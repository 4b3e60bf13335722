"""`headrace report`: write report.html of a run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from headrace.platform.keys import split_flags
from headrace.platform.servers import end_on_kill
from headrace.storage.core.errors import ErrorId, HeadraceError, InputError

USAGE = """\
usage: headrace report [run=]DIR|last [--json]
       headrace report [run=]DIR|last --live [port=N]

Writes report.html into the run's folder: loss, memory by tier, MFU, predicted and measured values, plan, configuration,
events. Also for a run that is not finished or was killed. Without a run it takes the newest one below runs/.
--live serves the page on this machine instead, made anew at every look; a browser loads it again every 10 s while the
run goes on. Ctrl-C ends it. Without a port it takes a free one.
"""


def run(argv: Sequence[str]) -> int:
    """Run `headrace report ...`.

    Raises:
        InputError: no such run, more than one, an unknown flag.
    """
    from headrace.platform.report.page import write_report
    from headrace.platform.tracking.run_folder import SUMMARY_FILE, find_run, read_json
    from headrace.platform.tracking.settle import settle_if_lost

    flags, words = split_flags(argv, ("--json", "--live"))
    words = [word.removeprefix("run=") for word in words]
    ports = [word for word in words if word.startswith("port=")]
    words = [word for word in words if word not in ports]
    if ports and "--live" not in flags:
        raise InputError(f"report: {ports[-1]} belongs to --live")
    if len(words) > 1:
        raise InputError(f"report: one run is expected, got {len(words)}: {' '.join(words)}")
    run_dir = find_run(words[0] if words and words[0] else "last")
    settle_if_lost(run_dir)
    if "--live" in flags:
        return _serve(run_dir, ports[-1].removeprefix("port=") if ports else "0")
    summary = read_json(run_dir / SUMMARY_FILE)
    try:
        path = write_report(run_dir)
    except HeadraceError:
        raise
    except (ArithmeticError, AttributeError, LookupError, OSError, TypeError, ValueError) as error:
        raise InputError(
            f"{run_dir}: its files are not those of a run, or cannot be read ({type(error).__name__}: {error})",
            id=ErrorId.data_wrong,
        ) from error
    if "--json" in flags:
        print(json.dumps({"report": str(path), "run": str(run_dir), "outcome": summary.get("outcome", "unknown")}))
    else:
        print(path)
    return 0


def _serve(run_dir: Path, port: str) -> int:
    from headrace.platform.report.live import serve_report

    if not port.isdigit():
        raise InputError(f"port={port}: a whole number is expected")
    end_on_kill()
    serve_report(run_dir, int(port), on_ready=lambda url: print(f"report: {url}   (Ctrl-C ends it)", flush=True))
    return 0
