"""One of the other ranks of a verification: `python -m headrace.workers.verify.other_rank RANK PORT CONFIG`.

CONFIG is JSON. The process ends with its driver.
"""

from __future__ import annotations

import sys

from headrace.storage.core.outside import parse_json
from headrace.storage.core.owners import die_with_parent
from headrace.workers.verify.config import VerifyConfig
from headrace.workers.verify.ranks import member
from headrace.workers.verify.verify import device_of, our_side


def main(argv: list[str]) -> None:
    """Make the runs of our side, as rank 0 does."""
    die_with_parent()
    rank, port, config = int(argv[0]), int(argv[1]), VerifyConfig.from_dict(parse_json(argv[2]))
    device = device_of(config, rank)
    with member(rank, port, config, device):
        our_side(config, device)


if __name__ == "__main__":
    main(sys.argv[1:])
