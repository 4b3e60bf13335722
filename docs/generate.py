"""Pages and pictures of the site that are made from the code, so that they cannot go stale. MkDocs calls `on_files`.

Needs the standard library and PyYAML; MkDocs only in `on_files`.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import sys
from collections import Counter
from enum import Enum
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]

from pictures import PICTURES  # noqa: E402

from headrace.platform.config.schema import KeyType, RunConfig, key_types  # noqa: E402

REPOSITORY_FILES = {"reference/numerics.md": "NUMERICS.md", "reference/changelog.md": "CHANGELOG.md"}


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages and pictures to those of pages/."""
    from mkdocs.structure.files import File

    made = {
        "reference/configuration.md": configuration_page(),
        "reference/measured.md": measured_page(),
        **{path: (ROOT / name).read_text() for path, name in REPOSITORY_FILES.items()},
        **{f"pictures/{name}.svg": draw() for name, draw in PICTURES.items()},
    }
    for path, content in made.items():
        files.append(File.generated(config, path, content=content))
    return files


def configuration_page() -> str:
    """The reference of every key: a section for each dataclass, a row for each key."""
    lines = [
        "# Configuration",
        "",
        "Every key of a run. `GROUP=CHOICE` takes a file of `conf/GROUP/`, `key=value` sets one key. The default is "
        "that of the class; the chosen files and the experiment replace it, and `make train dry=1` prints what a run "
        "has. This page is made from the dataclasses that the program reads.",
        "",
    ]
    lines += _section(RunConfig, "", "Top level")
    for overlay in ("experiment", "debug"):
        lines += [f"## {overlay}", "", "Replaces values of the choices above.", "", *choices(overlay)]
    return "\n".join(lines)


def _section(cls: type, prefix: str, title: str) -> list[str]:
    meanings = argument_texts(cls)
    rows, below = [], []
    for field in dataclasses.fields(cls):
        key = prefix + field.name
        kind = key_types()[key]
        if dataclasses.is_dataclass(kind.kind):
            below += _section(kind.kind, f"{key}.", key)
        else:
            meaning = meanings.get(field.name) or enum_text(kind)
            if not meaning:
                raise ValueError(f"{cls.__name__}.{field.name} has no line under `Args:` in the docstring of its class")
            rows.append(f"| `{key}` | {_cell(meaning)} | {_cell(_values(kind))} | {_default(field)} |")
    head = [f"## {title}", "", _cell(inspect.getdoc(cls).split("Args:")[0].strip()), "", *choices(title)]  # type: ignore[union-attr]
    if rows:
        head += ["| key | meaning | values | default |", "|---|---|---|---|", *rows, ""]
    return [*head, *below]


def choices(group: str) -> list[str]:
    """The files of a group with the comment that each begins with."""
    files = sorted((ROOT / "conf" / group).glob("*.yaml"))
    if not files:
        return []
    rows = []
    for file in files:
        comment = re.match(r"(?:#[^\n]*\n)*", file.read_text())[0].replace("# @package _global_\n", "")  # type: ignore[index]
        rows.append(f"| `{group}={file.stem}` | {_cell(comment.replace('# ', ' ').replace('#', ''))} |")
    return ["| choice | |", "|---|---|", *rows, ""]


def argument_texts(cls: type) -> dict[str, str]:
    """Of every field named under `Args:` in a class's docstring, its text on one line."""
    _, _, body = (inspect.getdoc(cls) or "").partition("Args:\n")
    found: dict[str, str] = {}
    names: list[str] = []
    for line in body.splitlines():
        start = re.match(r"    (\w+(?:(?: / |, )\w+)*): (.*)", line)
        if start:
            names = re.split(" / |, ", start[1])
            found |= dict.fromkeys(names, start[2])
        elif line.startswith("        "):
            for name in names:
                found[name] += f" {line.strip()}"
        else:
            names = []
    return found


def enum_text(kind: KeyType) -> str:
    """What an enumeration says of itself."""
    return (inspect.getdoc(kind.kind) or "") if issubclass(kind.kind, Enum) else ""


def _values(kind: KeyType) -> str:
    if issubclass(kind.kind, Enum):
        return ", ".join(f"`{member.value}`" for member in kind.kind) + (", `null`" if kind.optional else "")
    return kind.describe()


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
        return "from the chosen file"
    value = field.default if field.default is not dataclasses.MISSING else field.default_factory()  # type: ignore[misc]
    if value is None or isinstance(value, bool):
        return f"`{json.dumps(value)}`"
    if isinstance(value, list):
        return f"`{','.join(map(str, value))}`" if value else "empty"
    return f"`{value}`" if value not in ("", {}) else "empty"


def _cell(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip().replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


def measured_page() -> str:
    """Every file of tests/bench/results with its targets, met or not."""
    lines = [
        "# What was measured",
        "",
        "The rows of `tests/bench/results`, each made by one command (`headrace bench NAME`) and kept whether its "
        "target was met or not. Compare only numbers of one file. `met` counts the rows that met it.",
        "",
        "| benchmark | measured | commit | on | target | met |",
        "|---|---|---|---|---|---|",
    ]
    for file in sorted((ROOT / "tests" / "bench" / "results").glob("*/*.json")):
        record = json.loads(file.read_text())
        machine = record["machine"]
        place = ", ".join(gpu["name"] for gpu in machine["gpus"]) or f"{machine['cores']} CPU cores, no GPU"
        counts: Counter[str] = Counter()
        met: Counter[str] = Counter()
        for row in record["rows"]:
            if target := row["target"]:
                counts[target["text"]] += 1
                met[target["text"]] += bool(target["met"])
        name = record["bench"] + ("" if record["complete"] else " (cut short)")
        what = f"| {name} | {record['started'][:10]} | `{record['commit'][:9]}` | {place} |"
        lines += [f"{what} {_cell(text)} | {met[text]} of {count} |" for text, count in counts.items()]
    return "\n".join([*lines, ""])
