"""What ends a verb that serves."""

from __future__ import annotations

import signal
import subprocess
import sys

WAITS = """
import signal, time
from headrace.platform.servers import end_on_kill
end_on_kill()
try:
    print("ready", flush=True)
    time.sleep(600)
except KeyboardInterrupt:
    print("ended")
"""


def test_kill_ends_what_a_shell_has_put_behind_it() -> None:
    """A script's `&` makes its child ignore SIGINT: SIGTERM alone is left."""
    start_ignoring = ["sh", "-c", 'trap "" INT; exec "$@"', "sh", sys.executable, "-c", WAITS]
    with subprocess.Popen(start_ignoring, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            process.send_signal(signal.SIGINT)
            process.terminate()
            assert process.communicate(timeout=600)[0] == "ended\n"
        finally:
            process.kill()
