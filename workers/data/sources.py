"""Which files a source is made of, in which order, and what they hold."""

from __future__ import annotations

import hashlib
import sysconfig
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from headrace.storage.core.errors import ErrorId, InputError
from headrace.workers.data.config import DataConfig, SourceFormat

STDLIB = "stdlib"
SUFFIXES = {
    ".txt": SourceFormat.text,
    ".text": SourceFormat.text,
    ".md": SourceFormat.text,
    ".json": SourceFormat.jsonl,
    ".jsonl": SourceFormat.jsonl,
    ".ndjson": SourceFormat.jsonl,
    ".parquet": SourceFormat.parquet,
}
_TABLE = "save it as Parquet or JSON lines with a column `text`, or give data.format=text to read it as text"
_PACKED = "unpack it first"
_REMEDIES = {
    **dict.fromkeys((".csv", ".tsv", ".xls", ".xlsx"), _TABLE),
    **dict.fromkeys((".gz", ".zst", ".xz", ".bz2", ".zip", ".tar", ".tgz"), _PACKED),
    ".arrow": "save it as Parquet (`Dataset.to_parquet`)",
}
# Installed packages and version control are not the source tree itself. Folders that begin with a dot count too.
LEFT_OUT_FOLDERS = frozenset({"site-packages", "dist-packages", "node_modules", "__pycache__"})


@dataclass(frozen=True)
class SourceFile:
    """One file of a source. `name` is relative to the source folder, with forward slashes."""

    path: Path
    name: str
    num_bytes: int
    mtime_ns: int


@dataclass(frozen=True)
class Source:
    """What will be read: files in the order of their names."""

    description: str
    format: SourceFormat
    files: tuple[SourceFile, ...]
    skipped: Counter[str] = field(default_factory=Counter)

    @property
    def num_bytes(self) -> int:
        """Size of all files on disk."""
        return sum(file.num_bytes for file in self.files)

    def identity(self) -> str:
        """A digest of names, sizes and modification times: another digest means the source changed."""
        digest = hashlib.sha256(self.format.value.encode())
        for file in self.files:
            digest.update(f"\0{file.name}\0{file.num_bytes}\0{file.mtime_ns}".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()


def find_source(config: DataConfig) -> Source:
    """List the files of `config.source`.

    `auto` goes by suffix. A folder whose files match `data.pattern` is a source tree; otherwise its .txt, .json, .jsonl
    or .parquet files are read; where that is not clear, the format must be given.

    Raises:
        InputError: nothing there, nothing readable, nothing in it, a suffix that is not known, or a folder of several
            formats.
    """
    wanted = config.format
    if config.source == STDLIB:
        root, description = Path(sysconfig.get_path("stdlib")), "source text of the Python standard library"
        if wanted is SourceFormat.auto:
            wanted = SourceFormat.source_tree
    else:
        root, description = Path(config.source).expanduser(), str(config.source)
    try:
        root.stat()
    except OSError as error:
        raise InputError(f"data.source={config.source}: cannot be read ({error.strerror})") from error
    if root.is_file():
        chosen = _format_of_file(root, wanted, config.pattern)
        source = Source(description, chosen, (_describe(root, root.name),))
    else:
        source = _find_in_folder(root, wanted, config.pattern, description)
    if source.num_bytes == 0:
        raise InputError(f"data.source={config.source}: {len(source.files)} file(s), all of them empty")
    return source


def _describe(path: Path, name: str) -> SourceFile:
    try:
        status = path.stat()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    return SourceFile(path, name, status.st_size, status.st_mtime_ns)


def _format_of_file(path: Path, wanted: SourceFormat, pattern: str) -> SourceFormat:
    if wanted is not SourceFormat.auto:
        return SourceFormat.text if wanted is SourceFormat.source_tree else wanted
    suffix = path.suffix.lower()
    if suffix in SUFFIXES:
        return SUFFIXES[suffix]
    if path.match(pattern):  # one file of a source tree
        return SourceFormat.text
    remedy = _REMEDIES.get(suffix, "give data.format=text to read it as text, or jsonl or parquet if it is that")
    raise InputError(
        f"data.source={path}: {f'files named {suffix}' if suffix else 'files without a suffix'} are not supported "
        f"(only {', '.join(SUFFIXES)}); {remedy}",
        id=ErrorId.data_wrong,
    )


def _find_in_folder(root: Path, wanted: SourceFormat, pattern: str, description: str) -> Source:
    skipped: Counter[str] = Counter()
    found: dict[SourceFormat, list[SourceFile]] = {}

    def collect(format_: SourceFormat, path: Path) -> None:
        relative = path.relative_to(root)
        if any(part in LEFT_OUT_FOLDERS or part.startswith(".") for part in relative.parts[:-1]):
            skipped["in a folder of installed packages or a hidden one"] += 1
        elif path.is_file():
            found.setdefault(format_, []).append(_describe(path, relative.as_posix()))

    if wanted in (SourceFormat.auto, SourceFormat.source_tree):
        try:
            matches = list(root.glob(pattern))
        except (ValueError, NotImplementedError) as error:
            raise InputError(f"data.pattern={pattern!r}: not a pattern for files below the source ({error})") from error
        for path in matches:
            collect(SourceFormat.source_tree, path)
    is_tree = SourceFormat.source_tree in found
    if wanted is not SourceFormat.source_tree:
        for path in root.rglob("*"):
            suffix = path.suffix.lower()
            by_suffix = SUFFIXES.get(suffix)
            if by_suffix is None and not is_tree and path.is_file():
                skipped[f"named {suffix}" if suffix else "without a suffix"] += 1
            # Settings of a source tree are .json files too.
            if by_suffix and wanted in (SourceFormat.auto, by_suffix) and not (is_tree and suffix == ".json"):
                collect(by_suffix, path)
    chosen = _choose(root, wanted, found, skipped, pattern)
    files = sorted(found[chosen], key=lambda file: file.name)
    return Source(description, chosen, tuple(files), skipped)


def _choose(
    root: Path,
    wanted: SourceFormat,
    found: dict[SourceFormat, list[SourceFile]],
    skipped: Counter[str],
    pattern: str,
) -> SourceFormat:
    if wanted is not SourceFormat.auto:
        if not found.get(wanted):
            what = (
                pattern
                if wanted is SourceFormat.source_tree
                else ", ".join(s for s, f in SUFFIXES.items() if f is wanted)
            )
            raise InputError(f"{root}: no {what} file in it (data.format={wanted.value})")
        return wanted
    if not found:
        others = f" (there are files {', '.join(sorted(skipped))})" if skipped else ""
        raise InputError(f"{root}: no file matches data.pattern={pattern!r}, and none is {', '.join(SUFFIXES)}{others}")
    # A source tree usually has a README: text files beside it leave no doubt.
    kinds = set(found) - ({SourceFormat.text} if SourceFormat.source_tree in found else set())
    if len(kinds) > 1:
        counts = ", ".join(f"{len(found[kind])} {kind.value}" for kind in sorted(kinds, key=lambda kind: kind.value))
        raise InputError(f"{root}: holds several formats ({counts}); choose with data.format=...")
    return kinds.pop()
