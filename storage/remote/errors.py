"""What goes wrong between here and an object store, by name; and which of it may pass. No torch."""

from __future__ import annotations

import errno

from headrace.storage.core.errors import HeadraceError, InputError, MachineError

INSTALL = 'install it with `pip install "headrace[s3]"`'
# Answers that another attempt does not change, as the S3 client translates them: a bad request or range, a bucket in
# another region, a name that cannot be.
_PERMANENT = {errno.EINVAL, errno.EPERM, errno.ENOSYS, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR}
_PERMANENT |= {getattr(errno, "EREMCHG", errno.EINVAL)}
_NO_CREDENTIALS = {"NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "ProfileNotFound"}
_NO_CREDENTIALS |= {"TokenRetrievalError", "SSOTokenLoadError", "UnauthorizedSSOTokenError"}
_MAY_PASS = {"HTTPClientError", "ClientPayloadError", "ClientConnectionError", "IncompleteRead", "IncompleteReadError"}
_MAY_PASS |= {"FSTimeoutError", "TimeoutError", "ResponseParserError", "ResponseStreamingError", "ConnectionError"}
_CREDENTIALS = (
    "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE and ~/.aws "
    "(a public bucket: FSSPEC_S3='{\"anon\": true}')"
)


class RemoteUnavailable(MachineError):
    """The store did not answer, or not with all requested bytes, in any of the attempts. It may be temporary."""


class RemoteMissing(InputError):
    """There is no such object, folder or bucket."""


class RemoteChanged(InputError):
    """An object is not the one that was there before."""


def named_error(url: str, endpoint: str, error: Exception) -> HeadraceError | None:
    """What an error of the store's client means to a user; None where it is no error of the store.

    Args:
        url: of the object that was asked for.
        endpoint: who was asked.

    Returns:
        RemoteMissing, RemoteUnavailable or InputError; each names `url` and the remedy.
    """
    kinds = {kind.__name__ for kind in type(error).__mro__}
    words = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, FileNotFoundError):
        return RemoteMissing(f"{url}: there is no such object at {endpoint} ({words}); check the name")
    if isinstance(error, PermissionError):
        return InputError(
            f"{url}: access denied by {endpoint} ({words}); use credentials that may read and list it: {_CREDENTIALS}"
        )
    if kinds & _NO_CREDENTIALS:
        return InputError(f"{url}: no credentials for {endpoint} ({words}); {_CREDENTIALS}")
    if kinds & _MAY_PASS or (isinstance(error, OSError) and error.errno not in _PERMANENT):
        return RemoteUnavailable(
            f"{url}: {endpoint} cannot be reached, or did not answer whole ({type(error).__name__}: {words}); see that "
            "it runs and that AWS_ENDPOINT_URL, if it is set, is right, and try again"
        )
    if isinstance(error, OSError) or "BotoCoreError" in kinds:
        return InputError(f"{url}: refused by {endpoint} ({words}); check the URL, AWS_REGION and AWS_ENDPOINT_URL")
    return None
