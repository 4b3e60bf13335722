"""Checks of Ray's token and ports, by files, environment and sockets: Ray itself is not started, nor imported."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import urlsplit

from headrace.platform.control.auth_token import MODE, TOKEN_PATH, token_place
from headrace.platform.control.head import find_head
from headrace.platform.doctor.check import Check, fail, passed, warn
from headrace.workers.actors.net import port_answers

PORTS = {6379: "head (GCS)", 8265: "dashboard", 10001: "client"}
CONNECT_S = 2.0


@dataclass(frozen=True)
class TokenReading:
    """Where Ray would find its token.

    Args:
        mode: RAY_AUTH_MODE, lower case; None where it is unset (Ray then takes a token if there is one).
        source: where the token is, for people; None where there is none.
        broken: why the place that should hold a token does not; "" where it does, or where none was made yet.
        readable_by_others: a token file that other users of this machine can read.
        can_make: whether Ray could write a new token at its usual place.
        joins: RAY_ADDRESS names a cluster that was started elsewhere.
    """

    mode: str | None
    source: str | None
    broken: str = ""
    readable_by_others: bool = False
    can_make: bool = True
    joins: bool = False


def read_token(environment: Mapping[str, str], home: Path) -> TokenReading:
    """Look where Ray looks (headrace.platform.control.auth_token), and whether the token can be used."""
    mode = environment.get(MODE, "").lower() or None
    joins = cluster_of(environment) is not None
    place = token_place(environment, home)
    nearest = next(folder for folder in (home / ".ray", home, *home.parents) if folder.is_dir())
    can_make = os.access(nearest, os.W_OK)
    if place.path is None:
        return TokenReading(mode, place.words, can_make=can_make, joins=joins)
    broken = ""
    try:
        if not place.path.read_text().strip():
            broken = f"{place.path} is empty"
    except FileNotFoundError:
        broken = f"{place.path} does not exist" if environment.get(TOKEN_PATH) else ""
        place = replace(place, there=False)
    except OSError as error:
        broken = f"{place.path}: {error.strerror}"
    if broken or not place.there or place.path is None:
        return TokenReading(mode, None, broken, can_make=can_make, joins=joins)
    return TokenReading(mode, str(place.path), "", _others_can_read(place.path), can_make, joins)


def _others_can_read(path: Path) -> bool:
    path = path.resolve()
    return bool(path.stat().st_mode & 0o004) and all(folder.stat().st_mode & 0o001 for folder in path.parents)


def cluster_of(environment: Mapping[str, str]) -> tuple[str, int] | None:
    """Host and port of RAY_ADDRESS; None where it is unset, `local` or `auto`."""
    address = environment.get("RAY_ADDRESS", "").strip()
    if address in ("", "local", "auto"):
        return None
    return _host_port(address)


def _host_port(address: str) -> tuple[str, int]:
    """("", 0) where the text is no address."""
    try:
        parts = urlsplit(address if "://" in address else f"ray://{address}")
        return parts.hostname or "", parts.port or (8265 if parts.scheme.startswith("http") else 10001)
    except ValueError:
        return "", 0


def check_ray_token(token: TokenReading) -> Check:
    """Whether a cluster can be started or joined, and whether it is closed to others."""
    name = "ray token"
    if token.mode == "disabled":
        return warn(
            name, "RAY_AUTH_MODE=disabled", "anyone who can reach the cluster's ports can run code: unset RAY_AUTH_MODE"
        )
    if token.broken:
        return fail(
            name, f"no usable token: {token.broken}", "put the token there, or remove the file and the variable"
        )
    if token.source is None and token.joins:
        remedy = "copy the head's token (`ray get-auth-token` there) to ~/.ray/auth_token here, or set RAY_AUTH_TOKEN"
        found = "none, and RAY_ADDRESS names a cluster"
        return fail(name, found, remedy) if token.mode == "token" else warn(name, found, remedy)
    if token.source is None:
        if not token.can_make:
            return fail(name, "none, and ~/.ray cannot be written", "set RAY_AUTH_TOKEN, or HOME to a writable folder")
        return passed(name, "none yet; the first local cluster makes one in ~/.ray/auth_token")
    if token.readable_by_others:
        return warn(name, f"{token.source}, readable by every user of this machine", f"chmod 600 {token.source}")
    return passed(name, token.source)


@dataclass(frozen=True)
class PortsReading:
    """What answers where.

    Args:
        address: RAY_ADDRESS as host:port; None where a run would start its own cluster.
        answers: whether something listens there.
        head: the cluster that a note on this machine names (`make dashboard` and Ray leave one), as host:port.
        head_answers: whether something listens there.
        note: the file that names it, where Ray wrote it.
        taken: ports of PORTS on which something listens here.
    """

    address: str | None
    answers: bool
    head: str | None
    head_answers: bool
    note: str = ""
    taken: tuple[int, ...] = ()


def read_ports(environment: Mapping[str, str], *, ports: Mapping[int, str] = PORTS) -> PortsReading:
    """Knock at RAY_ADDRESS, at the cluster that a note names, and at the usual ports of this machine."""
    cluster = cluster_of(environment)
    ours = find_head()
    note = Path(environment.get("RAY_TMPDIR") or environment.get("TMPDIR") or "/tmp") / "ray" / "ray_current_cluster"
    try:
        head = ours.address if ours else note.read_text().strip() or None
    except OSError:
        head = None
    return PortsReading(
        address=None if cluster is None else f"{cluster[0]}:{cluster[1]}",
        answers=cluster is not None and port_answers(f"{cluster[0]}:{cluster[1]}", CONNECT_S),
        head=head,
        head_answers=head is not None and port_answers(head, CONNECT_S),
        note=str(note) if head is not None and ours is None else "",
        taken=tuple(port for port in ports if port_answers(f"127.0.0.1:{port}", CONNECT_S)),
    )


def check_ray_ports(ports: PortsReading) -> Check:
    """Whether the cluster that a run would join answers, and whether the usual ports are free for one of its own."""
    name = "ray ports"
    if ports.address is not None:
        if not ports.answers:
            remedy = (
                "start the cluster (`make dashboard` on the head), or unset RAY_ADDRESS to let runs start their own"
            )
            return fail(name, f"nothing answers at RAY_ADDRESS {ports.address}", remedy)
        return passed(name, f"a cluster answers at RAY_ADDRESS {ports.address}")
    if ports.head is not None and not ports.head_answers:
        return warn(
            name,
            f"the noted cluster address is out of date: a cluster at {ports.head} that does not answer",
            f"rm {ports.note}",
        )
    if ports.head is not None:
        return passed(name, f"a local cluster runs at {ports.head}")
    if ports.taken:
        found = ", ".join(f"{port} ({PORTS.get(port, 'asked for')})" for port in ports.taken)
        remedy = "headrace then uses other ports, also for the dashboard. `ss -ltnp` shows the programs that hold them"
        return warn(name, f"taken by something that is not a Ray cluster here: {found}", remedy)
    return passed(name, f"{', '.join(map(str, PORTS))} are free")
