"""Records of a Parquet file, row by row, from any row that was reached before."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from headrace.storage.core.errors import InputError
from headrace.storage.core.outside import open_regular
from headrace.workers.data.parquet_pages import footer_of, largest_pages, nested_texts
from headrace.workers.data.records import KEYS, kind_of, without_nulls, wrong

_BATCH_ROWS = 256
# Of values at a time. A column that repeats one large value is small in the file and large in memory.
_BATCH_BYTES = 1 << 30


def read_parquet_records(path: Path, start: int) -> Iterator[tuple[dict[str, Any], int]]:
    """The rows of a file behind the first `start`, each with its number from 1 on.

    Raises:
        OSError: it cannot be read. InputError: it is no Parquet file, or none of its columns holds records.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        with open_regular(path) as stream, pyarrow.parquet.ParquetFile(stream) as table:
            names = table.schema_arrow.names
            key = kind_of(names, str(path))
            wanted = [key, *(name for name in KEYS[key] if name in names)]
            row, footer = 0, footer_of(stream)
            # What a nested column repeats takes little memory as long as it is a dictionary.
            table = pyarrow.parquet.ParquetFile(stream, metadata=table.metadata, read_dictionary=nested_texts(footer))
            for group in range(table.num_row_groups):
                num_rows = table.metadata.row_group(group).num_rows
                if row + num_rows <= start:
                    row += num_rows
                    continue
                page_bytes = largest_pages(stream, footer, group, wanted, str(path))
                batch_rows = max(1, min(_BATCH_ROWS, _BATCH_BYTES // max(1, page_bytes)))
                for batch in table.iter_batches(batch_rows, row_groups=[group], columns=wanted):
                    for values in _python_rows(batch, f"{path}: row group {group}"):
                        row += 1
                        if row > start:
                            yield {name: without_nulls(value) for name, value in values.items()}, row
    except InputError:
        raise
    except (OSError, pyarrow.ArrowException, ValueError, OverflowError, LookupError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise wrong(f"{path}: not a readable Parquet file ({error})") from error


def _python_rows(batch: Any, where: str) -> Iterator[dict[str, Any]]:
    """The rows of a batch as Python values, of which at most _BATCH_BYTES exist at a time."""
    whole = sum(map(_repeated_bytes, batch.columns)) <= _BATCH_BYTES
    for part in [batch] if whole else (batch.slice(i, 1) for i in range(batch.num_rows)):
        num_bytes = 0 if whole else sum(map(_repeated_bytes, part.columns))
        if num_bytes > _BATCH_BYTES:
            raise wrong(f"{where}: a row of {num_bytes} bytes, at most {_BATCH_BYTES} are read; split its values")
        yield from part.to_pylist()


def _repeated_bytes(column: Any) -> int:
    """Bytes of an array's values, where a text of its dictionary counts as often as it stands in a row."""
    import pyarrow
    from pyarrow import compute, types

    if isinstance(column, pyarrow.DictionaryArray):
        return compute.sum(compute.binary_length(column.dictionary).take(column.indices)).as_py() or 0
    if types.is_map(column.type):
        offsets = column.offsets
        return _repeated_bytes(column.values[offsets[0].as_py() : offsets[-1].as_py()])
    if types.is_nested(column.type):
        parts = column.flatten()
        return sum(map(_repeated_bytes, parts if isinstance(parts, list) else [parts]))
    return column.nbytes
