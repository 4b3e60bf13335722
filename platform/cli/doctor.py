"""`headrace doctor`: check this machine: what is wrong, and the remedy."""

from __future__ import annotations

import json
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from headrace.platform.doctor.check import Check, Status
from headrace.platform.keys import read_keys, split_flags
from headrace.storage.core.errors import InputError

USAGE = """\
usage: headrace doctor [dir=DIR] [cluster.interface=NAME] [--json]
       headrace doctor --profile [dir=DIR] [out=DIR] [name=NAME] [--json]

Checks this machine in half a minute; every line is pass, warn or fail, with the remedy. Exit code 1 if a line fails.

  dir=DIR      where run folders and slab files would be; default: the current folder
  cluster.interface=NAME   of the network, as in a run; default: the one that a run takes
  --profile    measures rates instead (3 minutes at most with a GPU, under one without) and writes them as JSON rows
               and as a hardware profile
  out=DIR      folder for --profile; default: bench_results in the current folder
  name=NAME    of the hardware profile; copy its file to conf/hardware/ and use it as hardware=NAME
  --json       one JSON object on one line, last on standard output
"""
INTERFACE = "cluster.interface"
_FLAGS, _KEYS = ("--json", "--profile"), ("dir", "out", "name", INTERFACE)
_MARKS = {Status.passed: "\x1b[32m", Status.warn: "\x1b[33m", Status.fail: "\x1b[31m"}


def run(argv: Sequence[str]) -> int:
    """Run `headrace doctor ...`.

    Returns:
        0; 1 where a check fails, or where a profile could measure nothing.

    Raises:
        InputError: unknown words, or a folder that is none. MachineError: the profile cannot be written.
    """
    flags, values = _parse(argv)
    folder = Path(values.get("dir", ".")).expanduser().absolute()
    if not folder.is_dir():
        raise InputError(f"doctor: dir={values['dir']} is no folder; give an existing one")
    if "--profile" in flags:
        if INTERFACE in values:
            raise InputError(
                f"doctor: {INTERFACE}={values[INTERFACE]}: a profile tries no network; leave --profile out"
            )
        return _profile(folder, values, as_json="--json" in flags)
    if odd := [key for key in ("out", "name") if key in values]:
        raise InputError(f"doctor: {odd[0]}=... goes with --profile")
    return _diagnose(folder, values.get(INTERFACE), as_json="--json" in flags)


def _parse(argv: Sequence[str]) -> tuple[set[str], dict[str, str]]:
    flags, words = split_flags(argv, _FLAGS)
    return flags, read_keys(words, dict.fromkeys(_KEYS, str))


def _diagnose(folder: Path, interface: str | None, *, as_json: bool) -> int:
    from headrace.platform.doctor.diagnosis import diagnose, exit_code

    begin = time.perf_counter()
    checks = []
    for check in diagnose(folder, interface=interface):
        checks.append(check)
        if not as_json:
            _show(check)
    seconds = round(time.perf_counter() - begin, 1)
    counts = {status.value: sum(check.status is status for check in checks) for status in Status}
    code = exit_code(checks)
    if as_json:
        values: dict[str, Any] = {"ok": code == 0, **counts, "seconds": seconds, "dir": str(folder)}
        print(json.dumps(values | {"checks": [check.to_json() for check in checks]}))
    else:
        print("\n" + ", ".join(f"{count} {status}" for status, count in counts.items()) + f" ({seconds} s)")
    return code


def _show(check: Check) -> None:
    status = f"{check.status.value:<4}"
    if sys.stdout.isatty():
        status = f"{_MARKS[check.status]}{status}\x1b[0m"
    print(f"{status}  {check.name:<13}  {check.found}", flush=True)
    if check.remedy:
        print(textwrap.fill(check.remedy, 110, initial_indent=" " * 21 + "-> ", subsequent_indent=" " * 24), flush=True)


def _profile(folder: Path, values: dict[str, str], *, as_json: bool) -> int:
    import torch

    from headrace.platform.children import find
    from headrace.platform.doctor.machine_profile import hardware_fields, measure
    from headrace.platform.doctor.profile_files import check_name, make_profile, profile_name, write_profile
    from headrace.platform.paths import RESULTS_DIR
    from headrace.platform.tracking.provenance import provenance

    given = check_name(values["name"]) if "name" in values else None
    out = Path(values["out"]).expanduser() if "out" in values else RESULTS_DIR
    there = torch.cuda.is_available()  # some sandboxed machines with a GPU have no /proc/driver/nvidia
    rows, left_out = measure(folder, has_gpu=there, on_part=lambda line: print(line, file=sys.stderr, flush=True))
    measured = hardware_fields(rows)
    if not measured:
        print("headrace doctor: nothing could be measured: " + _reasons(left_out), file=sys.stderr)
        return 1
    has_gpu = find(rows, what="device") is not None
    profile = make_profile(given or profile_name(rows), measured, has_gpu=has_gpu)
    rows_path, yaml_path = write_profile(out, profile, rows, left_out, source=provenance())
    if as_json:
        files = {"rows_file": str(rows_path), "hardware_file": str(yaml_path)}
        print(json.dumps({"name": profile.name, **files, "measured": measured, "left_out": left_out}))
        return 0
    for key, value in measured.items():
        print(f"{key:<18}  {value:g}")
    if left_out:
        print(f"left out            {_reasons(left_out)}")
    print(f"rows                {rows_path}\nhardware profile    {yaml_path}")
    return 0


def _reasons(left_out: dict[str, str]) -> str:
    return "; ".join(f"{name} ({why})" for name, why in left_out.items()) or "no part ran"
