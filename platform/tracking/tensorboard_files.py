"""A run's copy in TensorBoard's event files, in the run folder. Imports tensorboard when a run is opened."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headrace.platform.tracking.run_folder import STEP, UNIX_S, finite_metrics

FOLDER = "tensorboard"


@dataclass(frozen=True)
class TensorboardFiles:
    """See Tracker.

    Args:
        run_dir: absolute. config_text: shown as text beside the curves.
    """

    run_dir: Path
    config_text: str
    name = "TensorBoard"
    state_file = "tensorboard.json"

    @property
    def tracking_uri(self) -> str:
        """The folder of the event files."""
        return str(self.run_dir / FOLDER)

    @property
    def look(self) -> str:
        """The command that shows this run beside its neighbours."""
        return f"tensorboard --logdir {self.run_dir.parent}"

    def open_run(self, run_id: str | None) -> EventFiles:
        """A new event file; TensorBoard joins those of a folder."""
        return EventFiles(self)


class EventFiles:
    """See TrackedRun."""

    def __init__(self, files: TensorboardFiles) -> None:
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self.run_id = files.tracking_uri
        self._config_text = files.config_text
        self._writer = EventFileWriter(files.tracking_uri)

    def describe(self) -> None:
        """The configuration, as text."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
        from tensorboard.compat.proto.tensor_pb2 import TensorProto

        text = "".join(f"    {line}\n" for line in self._config_text.splitlines())  # Markdown's code
        plugin = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text"))
        tensor = TensorProto(dtype="DT_STRING", string_val=[text.encode()])
        value = Summary.Value(tag="config/text_summary", metadata=plugin, tensor=tensor)
        self.log([Event(step=0, summary=Summary(value=[value]))])

    def points(self, line: Mapping[str, Any]) -> list[Any]:
        """One event with all metrics of the step."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=value) for name, value in finite_metrics(line).items()]
        return [Event(step=int(line[STEP]), wall_time=float(line.get(UNIX_S) or 0.0), summary=Summary(value=values))]

    def log(self, points: Sequence[Any]) -> None:
        """Write events and hand them to the system."""
        for event in points:
            self._writer.add_event(event)
        self._writer.flush()

    def sample_system(self, num_samples: int) -> int:
        """TensorBoard has no place for it."""
        return num_samples

    def close(self, status: str, artifacts: Sequence[Path], tags: Mapping[str, str]) -> None:
        """Close the file; the run folder, in which it lies, has the rest."""
        self._writer.close()
