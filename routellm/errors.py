"""Every error this software raises on purpose, as one tree.

::

    RouteLLMError                   exit status 1
    ├── UsageError                  exit status 2: the caller asked for something that cannot be
    ├── SourceError                 a source cannot be read (missing, truncated, wrong shape)
    │   └── SourceUnreachable       its host did not answer: worth another try
    ├── SnapshotError               a snapshot is missing, damaged or cannot be written
    ├── StorageError                the storage outside the home refuses, or holds what is damaged
    │   └── StorageUnreachable      it did not answer for a minute: worth another try
    ├── ValidationError             a critical expectation failed; nothing was trained
    ├── EmbeddingError              an encoder is missing, damaged or did not answer
    ├── BenchmarkError              a benchmark table is missing, damaged or lacks the pair's models
    ├── TrainingError               a router cannot be trained on these battles
    ├── JudgeError                  the LLM judge cannot be asked, or its run stopped early
    ├── BundleError                 a saved router is missing a file, damaged or of another kind
    ├── RegistryError               MLflow did not answer, or has no such version or alias
    ├── FeedbackError               the feedback store is not one of ours, or damaged
    │   └── FeedbackUnreachable     it does not answer: worth another try
    └── GatewayError                a request the gateway refuses or cannot serve (carries a status)

Messages say what was wrong, what was found and what to do, in one sentence a person can act on.
"""


class RouteLLMError(Exception):
    """Base of every expected failure; the command line prints its message without a traceback."""

    exit_code = 1


class UsageError(RouteLLMError):
    """The request itself is wrong: an unknown name, a value out of range, a missing option."""

    exit_code = 2


class SourceError(RouteLLMError):
    """A source of battles is missing, truncated, or not in a shape we know."""


class SourceUnreachable(SourceError):
    """The host of a source did not answer; it may at another time."""


class SnapshotError(RouteLLMError):
    """A snapshot is missing, damaged, or could not be written."""


class StorageError(RouteLLMError):
    """The storage that machines share refuses what is asked of it, or holds what is damaged."""


class StorageUnreachable(StorageError):
    """The storage did not answer, though it was asked for a while; it may at another time."""


class ValidationError(RouteLLMError):
    """A critical expectation failed, so nothing may be trained on the data."""


class EmbeddingError(RouteLLMError):
    """An encoder is missing, damaged, or did not answer."""


class BenchmarkError(RouteLLMError):
    """A benchmark table is missing, damaged, or lacks one of the pair's models."""


class TrainingError(RouteLLMError):
    """A router cannot be trained on the given battles."""


class JudgeError(RouteLLMError):
    """An endpoint that is asked (a judge, a verifier, a fuser) or its cache cannot be used, or the
    run stopped before its end.
    """


class BundleError(RouteLLMError):
    """A saved router is incomplete, damaged, or not of the expected kind."""


class RegistryError(RouteLLMError):
    """MLflow did not answer, or does not know the version or alias."""


class GatewayError(RouteLLMError):
    """A request the gateway refuses or cannot serve.

    Parameters
    ----------
    message : str
        What went wrong, for the person who sent the request.
    status : int
        HTTP status to answer with.
    code : str
        OpenAI-style error code.
    retry_after_s : float, optional
        Seconds after which another try makes sense; sent as ``Retry-After``.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        code: str = "invalid_request",
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.retry_after_s = retry_after_s
