"""What good preference data is: every rule, its severity, and the expectation that checks it.

Row rules look at one battle; a battle that fails is quarantined with the rule's name. Set rules
look at all battles together; a critical one that fails stops the flow.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from routellm.battles import LABEL_KINDS, WINNERS
from routellm.settings import ValidationSettings

if TYPE_CHECKING:
    from great_expectations.expectations.expectation import Expectation


@dataclass(frozen=True)
class Rule:
    """One rule.

    Attributes
    ----------
    column : str
        Column of the row frame or of the one-row profile frame that it looks at.
    meaning : str
        What it asks, in words for the README's table.
    setting : str
        The setting that moves it, or "".
    """

    name: str
    kind: Literal["row", "set"]
    severity: Literal["critical", "warning"]
    column: str
    meaning: str
    setting: str = ""

    def bounds(self, settings: ValidationSettings) -> tuple[float | None, float | None] | None:
        """Return the allowed (least, most), or None for a rule on a set of values."""
        return {
            "prompt_length": (0.0, float(settings.max_prompt_chars)),
            "preference_in_range": (0.0, 1.0),
            "enough_battles": (float(settings.min_battles), None),
            "quarantine_share": (0.0, settings.max_quarantine_share),
            "tie_share": settings.tie_share,
            "battles_per_model": (float(settings.min_battles_per_model), None),
            "language_mix": (0.0, settings.max_other_language_share),
            "label_kind_mix": (0.0, settings.max_label_kind_share),
            "age": (None, settings.max_age_days),
            "prompt_length_drift": (0.0, settings.max_population_stability),
            "model_mix_drift": (0.0, settings.max_population_stability),
            "winner_mix_drift": (0.0, settings.max_population_stability),
        }.get(self.name)

    def values(self) -> list[Any]:
        """Return the allowed values of a rule on a set of values."""
        return {
            "winner_known": list(WINNERS),
            "label_kind_known": list(LABEL_KINDS),
        }.get(self.name, [True])

    def expected(self, settings: ValidationSettings) -> str:
        bounds = self.bounds(settings)
        if bounds is None:
            return " or ".join(str(v).lower() for v in self.values())
        low, high = bounds
        if high is None:
            return f"at least {low:,.6g}"
        return f"at most {high:,.6g}" if not low else f"{low:g} to {high:g}"

    def expectation(self, settings: ValidationSettings) -> Expectation:
        """Return the rule as a Great Expectations expectation."""
        import great_expectations.expectations as gxe

        bounds = self.bounds(settings)
        meta = {"rule": self.name, "severity": self.severity}
        if self.name == "id_unique":
            return gxe.ExpectColumnValuesToBeUnique(column=self.column, meta=meta)
        if bounds is None:
            return gxe.ExpectColumnValuesToBeInSet(
                column=self.column, value_set=self.values(), meta=meta
            )
        low, high = bounds
        if self.kind == "set":  # shows the observed value in the Data Docs
            return gxe.ExpectColumnMaxToBeBetween(
                column=self.column, min_value=low, max_value=high, meta=meta
            )
        return gxe.ExpectColumnValuesToBeBetween(
            column=self.column, min_value=low, max_value=high, meta=meta
        )


RULES: tuple[Rule, ...] = (
    Rule("id_unique", "row", "critical", "battle_id", "no battle twice"),
    Rule("models_named", "row", "critical", "models_named", "both models have a name"),
    Rule("models_differ", "row", "critical", "models_differ", "`model_a` is not `model_b`"),
    Rule("winner_known", "row", "critical", "winner", "the winner is model_a, model_b or tie"),
    Rule("preference_in_range", "row", "critical", "preference_a",
         "P(model_a preferred) is a number in [0, 1]"),
    Rule("prompt_not_empty", "row", "critical", "prompt_not_empty", "the prompt has a word in it"),
    Rule("prompt_length", "row", "critical", "prompt_chars", "the prompt is not over a length",
         "validation.max_prompt_chars"),
    Rule("prompt_text", "row", "critical", "prompt_text",
         "the prompt is text: no NUL, less than 1 % replacement characters"),
    Rule("label_kind_known", "row", "critical", "label_kind", "the label kind is one we know"),
    Rule("enough_battles", "set", "critical", "rows", "battles worth training on",
         "validation.min_battles"),
    Rule("quarantine_share", "set", "critical", "quarantine_share",
         "share of new battles that failed a row rule", "validation.max_quarantine_share"),
    Rule("tie_share", "set", "critical", "tie_share", "share of ties", "validation.tie_share"),
    Rule("battles_per_model", "set", "warning", "fewest_battles",
         "battles of the model that has fewest", "validation.min_battles_per_model"),
    Rule("language_mix", "set", "warning", "other_language_share",
         "share of battles not in the commonest language",
         "validation.max_other_language_share"),
    Rule("label_kind_mix", "set", "warning", "largest_label_kind_share",
         "share of the commonest label kind", "validation.max_label_kind_share"),
    Rule("age", "set", "warning", "newest_age_days", "days since the newest dated battle",
         "validation.max_age_days"),
    Rule("prompt_length_drift", "set", "warning", "prompt_length_psi",
         "population stability index of prompt lengths, new battles against the last snapshot",
         "validation.max_population_stability"),
    Rule("model_mix_drift", "set", "warning", "model_psi",
         "population stability index of the model mix, likewise",
         "validation.max_population_stability"),
    Rule("winner_mix_drift", "set", "warning", "winner_psi",
         "population stability index of winners, likewise",
         "validation.max_population_stability"),
)  # fmt: skip


def rules_table() -> str:
    """Return the rules as a Markdown table: what the README shows."""
    lines = ["| rule | of | if it fails | asks | setting |", "| --- | --- | --- | --- | --- |"]
    for rule in RULES:
        fate = (
            "quarantined"
            if rule.kind == "row"
            else {"critical": "**stops the flow**", "warning": "a warning"}[rule.severity]
        )
        setting = f"`{rule.setting}`" if rule.setting else ""
        of = "a battle" if rule.kind == "row" else "the snapshot"
        lines.append(f"| `{rule.name}` | {of} | {fate} | {rule.meaning} | {setting} |")
    return "\n".join(lines) + "\n"
