"""How torch's CUDA allocator is set. torch reads the environment once, so this comes first. No torch."""

from __future__ import annotations

import os
from collections.abc import Mapping, MutableMapping

# The first one is torch's name from 2.9 on; where both are set it is the one that counts.
ALLOCATOR_VARIABLES = VARIABLE, OLD_VARIABLE = "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"
EXPANDABLE = "expandable_segments:True"


def set_allocator(environ: MutableMapping[str, str] = os.environ) -> None:
    """Let segments grow, unless the user has said what they should do; other settings of the user's stay.

    A segment of fixed size cannot be used for a larger tensor, and near full memory that is a gigabyte here and there.
    """
    name = OLD_VARIABLE if OLD_VARIABLE in environ and VARIABLE not in environ else VARIABLE
    given = environ.get(name, "")
    if "expandable_segments" not in given and "backend:cudaMallocAsync" not in given:
        environ[name] = ",".join(filter(None, (given, EXPANDABLE)))


def allocator_record(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The variables that torch reads and what they say, for the record of a run."""
    return {name: environ[name] for name in ALLOCATOR_VARIABLES if name in environ}
