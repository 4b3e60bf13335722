"""What `headrace doctor --profile` leaves behind: the rows as JSON, and a hardware profile for `hardware=NAME`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from headrace.platform.children import Row, find
from headrace.platform.planning.hardware import DeviceClass, Evidence, HardwareProfile
from headrace.platform.tracking.provenance import Provenance
from headrace.platform.tracking.run_folder import write_json, write_text
from headrace.storage.core.errors import InputError, MachineError

LAYER_SHARE = 0.7


def profile_name(rows: Sequence[Row]) -> str:
    """`h200_measured` and the like: a measured profile is kept beside the datasheet's and replaces none."""
    device = find(rows, what="device")
    if device is None:
        return "cpu_measured"
    # the word with a digit in it is the model: "NVIDIA H200", "NVIDIA GeForce RTX 4090", "NVIDIA A100-SXM4-80GB"
    words = re.split(r"[^a-z0-9]+", device["name"].lower())
    model = next((word for word in words if any(map(str.isdigit, word))), words[-1] or "gpu")
    return f"{model}_measured"


def check_name(name: str) -> str:
    """The name, where a file may be called that.

    Raises:
        InputError: other characters than letters, digits, dashes and underscores.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
        raise InputError(f"name={name!r}: letters, digits, - and _ only; it becomes hardware=NAME")
    return name


def make_profile(name: str, measured: Mapping[str, float], *, has_gpu: bool) -> HardwareProfile:
    """A profile with evidence `measured`.

    A layer is assumed to reach LAYER_SHARE of the best product: half of the peak, as the datasheet profiles assume, is
    about that much of what products reach. On a CPU a layer runs at the rate of its products.
    """
    return HardwareProfile(
        name=name,
        device_class=DeviceClass.cuda if has_gpu else DeviceClass.cpu,
        evidence=Evidence.measured,
        compute_efficiency=LAYER_SHARE if has_gpu else 1.0,
        link_efficiency=1.0,
        **measured,
    )


def profile_yaml(profile: HardwareProfile, comment: str) -> str:
    """The text of conf/hardware/NAME.yaml: the fields of HardwareProfile in their order, null where unknown."""
    lines = [f"# {line}" for line in comment.splitlines()]
    for item in fields(profile):
        value = getattr(profile, item.name)
        text = "null" if value is None else str(value)
        lines.append(f"{item.name}: {text}")
    return "\n".join(lines) + "\n"


def write_profile(
    out: Path, profile: HardwareProfile, rows: Sequence[Row], left_out: Mapping[str, str], *, source: Provenance
) -> tuple[Path, Path]:
    """Write OUT/doctor-profile/TIME-COMMIT.json and OUT/doctor-profile/NAME.yaml, each whole or not at all.

    Returns:
        Both paths.

    Raises:
        MachineError: the folder cannot be written.
    """
    begin = datetime.now(UTC)
    folder = out / "doctor-profile"
    content: dict[str, Any] = {"bench": "doctor-profile", "started": begin.isoformat(timespec="seconds")}
    content |= {**source.to_json(), "profile": profile.name, "left_out": dict(left_out), "rows": list(rows)}
    comment = f"Measured by `headrace doctor --profile` on {begin:%Y-%m-%d} at commit {source.commit[:9]}."
    if left_out:
        comment += f"\nNot (wholly) measured: {', '.join(left_out)}."
    rows_path = folder / f"{begin:%Y%m%dT%H%M%SZ}-{source.commit[:9]}.json"
    yaml_path = folder / f"{profile.name}.yaml"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(rows_path, content)
        write_text(yaml_path, profile_yaml(profile, comment))
    except OSError as error:
        raise MachineError(
            f"out={out}: cannot write {error.filename} ({error.strerror}); choose another folder"
        ) from error
    return rows_path, yaml_path
