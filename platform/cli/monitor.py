"""`headrace monitor`: Prometheus and Grafana on the cluster of this machine, and a page of the newest run."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from headrace.platform.keys import read_keys, split_flags
from headrace.platform.monitor.files import Addresses, write_monitor_files
from headrace.platform.servers import HOST, Server, answers, end_on_kill, port_or_free
from headrace.storage.core.errors import InputError, MachineError

USAGE = """\
usage: headrace monitor [prometheus=URL] [dashboard=URL] [--files] [--json]

Starts Prometheus with our alerts on the Ray head of `headrace dashboard` (which is started where there is none),
Grafana with our board and those of Ray where it is installed, and a page of the newest run below runs/. Ctrl-C ends all
but the head. Prometheus is the system's package: apt-get install prometheus.
  prometheus=URL  use this Prometheus and start none: it must read the files that are written
  dashboard=URL   Ray's dashboard of another cluster, as http://10.0.0.1:8265; its token is this user's
  --files         write the files of Prometheus and Grafana, say where they are, and stop
"""
GRAFANA_HOME = "/usr/share/grafana"


@dataclass(frozen=True)
class Watched:
    """A cluster, its addresses, and the folder of the files.

    Args:
        looks_elsewhere: the address at which the dashboard looks for Prometheus, where that is another one.
    """

    addresses: Addresses
    folder: Path
    looks_elsewhere: str | None


def run(argv: Sequence[str]) -> int:
    """Run `headrace monitor ...`.

    Raises:
        InputError: an unknown word, not a URL, nothing answers there. MachineError: Prometheus is not installed, or Ray
            did not start. HeadraceError: Prometheus or Grafana did not start, or ended.
    """
    values = parse(argv)
    if "prometheus" not in values and "--files" not in argv:
        prometheus_program()
    watched = prepare(values)
    if "--files" in argv:
        _tell(watched, as_json="--json" in argv)
        return 0
    end_on_kill()
    serve(watched, start_prometheus="prometheus" not in values, as_json="--json" in argv)
    return 0


def parse(argv: Sequence[str]) -> dict[str, str]:
    """`prometheus=URL` and `dashboard=URL`, without a slash at the end.

    Raises:
        InputError: another word, or not a URL.
    """
    _, words = split_flags(argv, ("--files", "--json"))
    values = read_keys(words, {"prometheus": str, "dashboard": str})
    for key, value in values.items():
        if not value.startswith(("http://", "https://")):
            port = 9090 if key == "prometheus" else 8265
            raise InputError(f"{key}={value}: a URL is expected, as {key}=http://127.0.0.1:{port}")
    return {key: value.rstrip("/") for key, value in values.items()}


def prepare(values: dict[str, str]) -> Watched:
    """Find or start the cluster, and write the files. Raises as `run`."""
    from headrace.platform.control.auth_token import read_token, token_is_off, token_place
    from headrace.platform.control.head import GRAFANA_URL, PROMETHEUS_URL, find_head, monitor_folder, start_head

    given, head = values.get("prometheus"), find_head()
    if given is not None and not answers(f"{given}/-/ready"):
        raise InputError(f"prometheus={given}: no Prometheus is ready there; leave it out to start one")
    prometheus = given or _free(PROMETHEUS_URL if head is None else head.prometheus_url, PROMETHEUS_URL)
    grafana = _free(GRAFANA_URL if head is None else head.grafana_url, GRAFANA_URL)
    elsewhere = None
    cluster = values.get("dashboard")
    if cluster is None:
        head = head or start_head(prometheus, grafana)
        cluster = head.dashboard_url
        elsewhere = head.prometheus_url if head.prometheus_url != prometheus else None
    place, folder = token_place(), monitor_folder()
    token = None if token_is_off() or not place.there else place.path or read_token(place)
    addresses = Addresses(cluster, prometheus, grafana)
    try:
        write_monitor_files(folder, addresses, token)
    except OSError as error:
        raise MachineError(f"{folder}: cannot be written ({error.strerror}); set XDG_CACHE_HOME") from error
    return Watched(addresses, folder, elsewhere)


def serve(watched: Watched, *, start_prometheus: bool, as_json: bool) -> None:
    """Start what is to be started, say where it is, and serve the page of the newest run until an interrupt."""
    from headrace.platform.report.live import serve_report

    with ExitStack() as ending:
        try:
            if start_prometheus:
                ending.enter_context(prometheus(watched.folder, watched.addresses.prometheus))
            has_grafana = (words := grafana_words(watched.folder)) is not None
            if words is not None:
                server = Server("Grafana", words, watched.folder / "grafana.log")
                ending.enter_context(server.running(f"{watched.addresses.grafana}/api/health"))

            def ready(url: str) -> None:
                _tell(watched, as_json=as_json, has_grafana=has_grafana, page=url)

            serve_report(None, 0, on_ready=ready)
        except KeyboardInterrupt:
            return


def prometheus_program() -> str:
    """The program. Raises MachineError where it is not installed."""
    found = shutil.which("prometheus")
    if found is None:
        raise MachineError(
            "Prometheus is not installed: apt-get install prometheus, or give prometheus=URL of one that runs"
        )
    return found


def prometheus(folder: Path, url: str) -> AbstractContextManager[None]:
    """A Prometheus on the files of the folder, which keeps its data there; ends with the block. Raises as `run`."""
    words = [prometheus_program(), f"--config.file={folder / 'prometheus.yml'}"]
    words += [f"--storage.tsdb.path={folder / 'prometheus_data'}", f"--web.listen-address={url.partition('//')[2]}"]
    return Server("Prometheus", words, folder / "prometheus.log").running(f"{url}/-/ready")


def grafana_words(folder: Path) -> list[str] | None:
    """The command of Grafana; None where it is not installed."""
    for words in (["grafana-server"], ["grafana", "server"]):
        if (program := shutil.which(words[0])) is not None:
            return [program, *words[1:], f"--homepath={GRAFANA_HOME}", f"--config={folder / 'grafana/grafana.ini'}"]
    return None


def _free(url: str, default: str) -> str:
    """An address of this machine with its port, or with a free one where that is taken; of another machine: default."""
    parts = urlsplit(url)
    port = parts.port if parts.hostname in (HOST, "localhost") else None
    return f"http://{HOST}:{port_or_free(port or int(default.rpartition(':')[2]))}"


def _tell(watched: Watched, *, as_json: bool, has_grafana: bool = False, page: str | None = None) -> None:
    addresses, folder = watched.addresses, watched.folder
    if as_json:
        facts = {**vars(addresses), "has_grafana": has_grafana, "page": page, "folder": str(folder)}
        print(json.dumps(facts), flush=True)
        return
    print(f"Ray         {addresses.cluster}  (its token: headrace dashboard --status)")
    print(f"Prometheus  {addresses.prometheus}  (its page Alerts)")
    if has_grafana:
        print(f"Grafana     {addresses.grafana}/d/headrace")
    else:
        print(f"Grafana     not started here; one that reads {folder / 'grafana/provisioning'} shows the board")
    if page is not None:
        print(f"newest run  {page}   (Ctrl-C ends all but the Ray head)")
    print(f"files       {folder}", flush=True)
    if watched.looks_elsewhere is not None:
        print(
            f"Ray's dashboard looks for Prometheus at {watched.looks_elsewhere}: for its own panels, end the head "
            "(headrace dashboard --stop) and start this again",
            file=sys.stderr,
        )
