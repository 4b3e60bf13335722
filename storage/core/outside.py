"""Files from outside: run folders, models, tokenizers, data. No torch.

They are read as bytes, as JSON and as plain YAML, never unpickled. Refused here: a pipe or a device in place of a file
(reading would wait for ever), a very large file (it would fill the memory), JSON and YAML nested too deeply (it would
end in a traceback), aliases in YAML (they can grow without limit).
"""

from __future__ import annotations

import errno
import json
import os
import stat
from io import BufferedReader
from pathlib import Path
from typing import Any

import yaml

MAX_BYTES = 1 << 30
MAX_YAML_BYTES, MAX_YAML_DEPTH = 1 << 20, 32


def open_regular(path: Path | str) -> BufferedReader:
    """Open a file for reading.

    Raises:
        OSError: it cannot be opened, or is no regular file (a pipe, a device, a folder).
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # the open of a pipe would wait
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return open(descriptor, "rb")


def read_regular(path: Path | str, max_bytes: int = MAX_BYTES) -> bytes:
    """The content of a file.

    Raises:
        OSError: as open_regular, or it holds more than `max_bytes`.
    """
    with open_regular(path) as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise OSError(errno.EFBIG, f"larger than {max_bytes} bytes", str(path))
    return content


def parse_json(text: bytes | str) -> Any:
    """The value of a JSON text (bytes are UTF-8).

    Raises:
        ValueError: it is no JSON, or nested too deeply to be read.
    """
    try:
        return json.loads(text.decode("utf-8") if isinstance(text, bytes) else text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def yaml_text(path: Path | str) -> str:
    """The text of a YAML file that is safe to load: small, of no great depth, and without aliases, which can grow.

    Raises:
        OSError: as read_regular. ValueError: it is not such a text.
    """
    text, depth = read_regular(path, MAX_YAML_BYTES).decode("utf-8"), 0
    try:
        for event in yaml.parse(text):
            if isinstance(event, yaml.AliasEvent):
                raise ValueError(f"line {event.start_mark.line + 1}: aliases (*{event.anchor}) are not read")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_YAML_DEPTH:
                raise ValueError(f"line {event.start_mark.line + 1}: nested too deeply")
    except yaml.YAMLError as error:
        raise ValueError(f"not YAML: {' '.join(str(error).split())}") from error
    return text
