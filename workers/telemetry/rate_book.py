"""Rates that were measured on this machine, kept in XDG_CACHE_HOME/headrace/rates/. No torch.

A rate that every run measures anew follows the load of the moment, and so do predictions and MFU.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from headrace.storage.core.durable import replace_durably
from headrace.storage.core.outside import parse_json, read_regular
from headrace.storage.remote.cache import cache_home

Measure = Callable[[], Sequence[float | None]]


@dataclass(frozen=True)
class KeptRates:
    """One measurement.

    Args:
        rates: in the caller's units and order; None is what could not be measured.
        load: average of the last minute, before it was measured. cores: that this process may use.
        measured: UTC, as 2026-11-29 09:15.
    """

    rates: tuple[float | None, ...]
    load: float
    cores: int
    measured: str

    @property
    def was_busy(self) -> bool:
        """Whether other programs used the cores too: the rates are too low then."""
        return self.load > self.cores


class RateBook:
    """Measures a rate once and keeps it until `forget` is called.

    What was measured while the load exceeded the cores is measured again at the first call when it does not. A cache
    that cannot be written is done without.

    Args:
        path: of the file; None: this machine's.
        load: the load average now.
    """

    def __init__(self, path: Path | None = None, *, load: Callable[[], float] = lambda: os.getloadavg()[0]) -> None:
        self.cores = len(os.sched_getaffinity(0))
        name = f"{socket.gethostname()}-{self.cores}-cores.json"
        self.path = cache_home() / "rates" / name if path is None else path
        self.load = load()
        self._used: list[KeptRates] = []

    @property
    def is_busy(self) -> bool:
        """Whether the load exceeds the cores now."""
        return self.load > self.cores

    def rates(self, name: str, measure: Measure) -> tuple[float | None, ...]:
        """The kept rates of this name, or new ones."""
        kept = self._read().get(name)
        if kept is None or (kept.was_busy and not self.is_busy):
            now = f"{datetime.now(UTC):%Y-%m-%d %H:%M}"
            kept = KeptRates(tuple(measure()), self.load, self.cores, now)
            if None not in kept.rates:
                self._write(name, kept)
        self._used.append(kept)
        return kept.rates

    def forget(self) -> None:
        """Have everything measured again."""
        with suppress(OSError):
            self.path.unlink(missing_ok=True)

    def note(self) -> str:
        """When and under which load the requested rates were measured; "" if none was."""
        if not self._used:
            return ""
        worst = max(self._used, key=lambda kept: kept.load)
        when = min(kept.measured for kept in self._used)
        words = f"measured {when} UTC at a load of {worst.load:.1f} on {worst.cores} cores"
        return words + (", so they may be too low" if worst.was_busy else "") + "; `headrace doctor` measures again"

    def warning(self) -> str | None:
        """The warning for the user if other programs use the cores too."""
        if not self.is_busy:
            return None
        return (
            f"the load average is {self.load:.1f} on {self.cores} cores: other programs slow a run down now, and what "
            "is measured now is too low; stop them for times that can be compared"
        )

    def _read(self) -> dict[str, KeptRates]:
        try:
            found = parse_json(read_regular(self.path))
            return {
                name: KeptRates(
                    tuple(map(float, each["rates"])), float(each["load"]), int(each["cores"]), str(each["measured"])
                )
                for name, each in found.items()
            }
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return {}  # none yet, or not ours: measured again

    def _write(self, name: str, kept: KeptRates) -> None:
        book = self._read() | {name: kept}
        with suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            content = json.dumps({name: asdict(each) for name, each in book.items()}, indent=1)
            replace_durably(self.path, content.encode())
