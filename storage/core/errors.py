"""The errors that a caller may want to distinguish, and the stable id that each one carries. No torch."""

from __future__ import annotations

from enum import StrEnum


class ErrorId(StrEnum):
    """What went wrong, in one stable word.

    Sentences may be rewritten; an id stays. The command line prints it behind the sentence, and tests compare
    it instead of the sentence. Keep the list in alphabetical order.
    """

    chat_template_failed = "chat_template_failed"
    checkpoint_damaged = "checkpoint_damaged"
    checkpoint_missing = "checkpoint_missing"
    cluster_too_small = "cluster_too_small"
    cluster_unreachable = "cluster_unreachable"
    data_damaged = "data_damaged"
    data_without_stop = "data_without_stop"
    data_wrong = "data_wrong"
    device_budget_exceeded = "device_budget_exceeded"
    failed = "failed"
    host_memory_low = "host_memory_low"
    input_wrong = "input_wrong"
    machine_lacks = "machine_lacks"
    mlflow_store_damaged = "mlflow_store_damaged"
    model_folder_contradicted = "model_folder_contradicted"
    model_folder_wrong = "model_folder_wrong"
    model_not_supported = "model_not_supported"
    other_tokenizer = "other_tokenizer"
    package_missing = "package_missing"
    recipe_wrong = "recipe_wrong"
    run_folder_in_use = "run_folder_in_use"
    run_folder_unusable = "run_folder_unusable"
    run_folder_used = "run_folder_used"
    ssd_path_unusable = "ssd_path_unusable"
    tier_full = "tier_full"
    token_refused = "token_refused"
    tokenizer_wrong = "tokenizer_wrong"
    training_diverged = "training_diverged"
    transfer_failed = "transfer_failed"


class HeadraceError(Exception):
    """Base of every error that headrace raises on purpose.

    Args:
        message: a sentence for the user: key, value and remedy.
        id: the case; without it the class's own, more general id.
    """

    id: ErrorId = ErrorId.failed

    def __init__(self, message: str = "", *, id: ErrorId | None = None) -> None:
        super().__init__(message)
        if id is not None:
            self.id = id


class InputError(HeadraceError, ValueError):
    """What the user gave cannot be used: the message names the key or file, the value and the remedy. Exit code 2."""

    id = ErrorId.input_wrong


class TierFull(HeadraceError):
    """A tier has no room. The message names the tier, the bytes wanted and the bytes there."""

    id = ErrorId.tier_full


class DeviceBudgetExceeded(TierFull):
    """The bytes resident on the device passed `tiers.device.budget_gib`."""

    id = ErrorId.device_budget_exceeded


class TransferFailed(HeadraceError):
    """A blob did not arrive whole: I/O error, short read or checksum mismatch. Never answered with zeros."""

    id = ErrorId.transfer_failed


class MachineError(HeadraceError):
    """The machine lacks what the run needs (memory, disk); names wanted, there and remedy. Exit code 2."""

    id = ErrorId.machine_lacks
