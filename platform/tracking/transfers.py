"""The transfer log of a run folder: the ranks' parts joined, and what it adds up to. No torch."""

from __future__ import annotations

from pathlib import Path

from headrace.platform.tracking import run_folder as folder
from headrace.storage.core.errors import HeadraceError
from headrace.storage.transfer_log import merge_parquet


def merge_transfers(run_dir: Path) -> None:
    """Move the ranks' transfer logs into transfers.parquet, behind what is there already. No part, no change.

    Parts are those of every start of the group, and what a killed rank had spooled; they are removed once they are in.

    Raises:
        HeadraceError: damaged parts, named; they stay where they are and the others are merged.
    """
    import pyarrow.parquet as pq

    merged = run_dir / folder.TRANSFERS_FILE
    found = [
        p for form in ("transfers*.parquet", ".transfers-*.parquet") for p in (run_dir / "ranks").glob(f"*/{form}")
    ]
    whole, damaged = [], []
    for part in sorted(found, key=lambda p: (p.stat().st_mtime, str(p))):
        try:
            pq.read_schema(part)
            whole.append(part)
        except (OSError, ValueError) as error:
            damaged.append(f"{part}: {error}")
    if whole:
        merge_parquet([merged, *whole] if merged.exists() else whole, merged)
        for part in whole:
            part.unlink()
    if damaged:
        raise HeadraceError("left out " + "; ".join(damaged))


def moved_bytes(path: Path) -> dict[str, dict[str, int]]:
    """Bytes of a transfer log by tier and direction; empty where there is none."""
    if not path.exists():
        return {}
    import pyarrow.parquet as pq

    sums: dict[str, dict[str, int]] = {}
    table = pq.read_table(path, columns=["tier", "direction", "bytes"])
    for row in table.group_by(["tier", "direction"]).aggregate([("bytes", "sum")]).to_pylist():
        sums.setdefault(row["tier"], {})[row["direction"]] = int(row["bytes_sum"])
    return sums
