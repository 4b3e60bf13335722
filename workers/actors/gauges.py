"""A rank's metrics on Ray's dashboard and in Prometheus.

Ray removes a gauge that was not set for two of its report intervals, and a step at a million tokens takes minutes: a
side thread sets the last values again and again.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping

from ray.util.metrics import Gauge

from headrace.workers.telemetry.exported import exported_name, help_text
from headrace.workers.telemetry.names import split_tensor

# Ray's report interval is 2 s in clusters that we start (platform/control/ray_env.py), and never less than 1 s.
REFRESH_S = 1.0
LABELS = ("run", "rank")
TENSOR = "tensor"


class RankGauges:
    """One gauge per metric, labelled by run and rank, and by tensor where it has one. Ray adds the prefix `ray_`.

    Args:
        refresh_s: between two settings of the same value.
    """

    def __init__(self, run_name: str, rank: int, *, refresh_s: float = REFRESH_S) -> None:
        self._labels = {"run": run_name, "rank": str(rank)}
        self._refresh_s = refresh_s
        self._lock = threading.Lock()
        self._gauges: dict[str, Gauge] = {}
        self._values: dict[str, float] = {}
        self._closed = threading.Event()
        threading.Thread(target=self._keep_alive, name="gauges", daemon=True).start()

    def update(self, metrics: Mapping[str, float]) -> None:
        """Remember values; the side thread sets them, so that the training thread waits for nothing."""
        with self._lock:
            self._values.update({name: value for name, value in metrics.items() if math.isfinite(value)})

    def close(self) -> None:
        """Stop setting the values: they vanish from the board soon."""
        self._closed.set()

    def _keep_alive(self) -> None:
        while not self._closed.wait(self._refresh_s):
            self.set_all()

    def set_all(self) -> None:
        """Set every gauge to its last value."""
        with self._lock:
            values = dict(self._values)
        for name, value in values.items():
            family, tensor = split_tensor(name)
            gauge = self._gauges.get(family)
            if gauge is None:
                labels = LABELS if tensor is None else (*LABELS, TENSOR)
                gauge = Gauge(exported_name(family), description=help_text(family), tag_keys=labels)
                gauge.set_default_tags(self._labels)
                self._gauges[family] = gauge
            gauge.set(value, {} if tensor is None else {TENSOR: tensor})
