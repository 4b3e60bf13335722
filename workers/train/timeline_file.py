"""Names in a rank's timeline of one step. No torch."""

from __future__ import annotations

TIMELINE_FILE = "timeline.json"
FORWARD, HEAD, BACKWARD, UPDATE = "forward", "head", "backward", "update"
