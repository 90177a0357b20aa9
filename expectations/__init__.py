"""What good preference data is, and the checks that hold a snapshot to it."""

from expectations.rules import RULES, rules_table
from expectations.validate import RuleResult, Validation, data_docs, validate, validate_snapshot

__all__ = [
    "RULES",
    "RuleResult",
    "Validation",
    "data_docs",
    "rules_table",
    "validate",
    "validate_snapshot",
]
