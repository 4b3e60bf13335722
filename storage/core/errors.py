"""The errors a caller may want to tell apart. No torch."""

from __future__ import annotations


class HeadraceError(Exception):
    """Base of every error that headrace raises on purpose."""


class InputError(HeadraceError, ValueError):
    """What the user gave cannot be used: the message names the key or file, the value and the remedy. Exit code 2."""


class TierFull(HeadraceError):
    """A tier has no room. The message names the tier, the bytes wanted and the bytes there."""


class DeviceBudgetExceeded(TierFull):
    """The bytes resident on the device passed `tiers.device.budget_gib`."""


class TransferFailed(HeadraceError):
    """A blob did not arrive whole: I/O error, short read or checksum mismatch. Never answered with zeros."""


class MachineError(HeadraceError):
    """The machine lacks what the run needs (memory, disk); names wanted, there and remedy. Exit code 2."""
