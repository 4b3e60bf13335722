"""Where a byte of a range that several files make together lies. No torch.

Stripes of S bytes go to the n files in turn, as in RAID 0:

    address a is byte (a // (S n)) S + a mod S of file (a // S) mod n
"""

from __future__ import annotations


def locate(address: int, num_files: int, stripe_bytes: int) -> tuple[int, int]:
    """File index and byte offset in it. One file needs no stripes: `stripe_bytes` may be 0 then."""
    if num_files == 1:
        return 0, address
    stripe, rest = divmod(address, stripe_bytes)
    turn, file = divmod(stripe, num_files)
    return file, turn * stripe_bytes + rest


def file_bytes(total_bytes: int, num_files: int, stripe_bytes: int) -> list[int]:
    """How long each file is where `total_bytes` are spread over them."""
    if num_files == 1:
        return [total_bytes]
    turns, rest = divmod(total_bytes, stripe_bytes * num_files)
    return [turns * stripe_bytes + min(stripe_bytes, max(0, rest - file * stripe_bytes)) for file in range(num_files)]
