"""What can be wrong with a feedback store."""

from routellm.errors import RouteLLMError


class FeedbackError(RouteLLMError):
    """The feedback store is missing, damaged, or of a later schema than this software's."""


class FeedbackUnreachable(FeedbackError):
    """The feedback store does not answer; it may at another time."""
