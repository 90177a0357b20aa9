"""Hold staged battles to the rules: pass them on, quarantine them, or stop.

Great Expectations runs every rule at ``SUMMARY`` over columns derived from the battles (never the
prompt texts themselves). The rows to quarantine come from the same columns, and the two counts
must agree.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from expectations.profile import COLUMNS, Profile, merge, profile, set_figures
from expectations.rules import RULES, Rule
from routellm.battles import BATTLE_SCHEMA
from routellm.errors import ValidationError
from routellm.ingest import Staged
from routellm.lock import alone
from routellm.settings import Settings, ValidationSettings
from routellm.snapshots import Manifest, SnapshotStore

if TYPE_CHECKING:
    import pandas as pd

_REPLACEMENT_SHARE = 0.01  # more U+FFFD than this and the text was decoded wrongly


@dataclass(frozen=True)
class RuleResult:
    """What one rule found."""

    name: str
    kind: str
    severity: str
    passed: bool
    observed: str
    expected: str
    failed_rows: int = 0


@dataclass(frozen=True)
class Validation:
    """What all rules found.

    Attributes
    ----------
    passed : bool
        No critical set rule failed (rows that fail a row rule are quarantined, not fatal).
    checked_parts : tuple of Path
        The battles that passed, as Parquet parts.
    quarantine_path : Path or None
        The rows that did not, with the columns ``rule`` and ``found``.
    data_docs : Path or None
        Index page of the Great Expectations Data Docs.
    """

    passed: bool
    rules: tuple[RuleResult, ...]
    checked_parts: tuple[Path, ...] = ()
    quarantined_by_rule: dict[str, int] = field(default_factory=dict)
    quarantine_path: Path | None = None
    data_docs: Path | None = None
    profile: Profile = field(default_factory=dict)

    def summary(self) -> dict[str, Any]:
        """Return what a snapshot's manifest keeps."""
        return {
            "passed": self.passed,
            "rules": [asdict(rule) for rule in self.rules],
            "profile": self.profile,
        }

    def raise_if_failed(self) -> None:
        """Raise ValidationError naming the critical rules that failed."""
        failed = [
            f"{r.name} is {r.observed} (expected {r.expected})"
            for r in self.rules
            if not r.passed and r.kind == "set" and r.severity == "critical"
        ]
        if failed:
            kept = f"; the rows are in {self.quarantine_path}" if self.quarantine_path else ""
            raise ValidationError(
                f"the data failed validation: {'; '.join(failed)}; nothing was added to the "
                f"snapshot{kept}: mend the source or move the setting in docs/validation.md"
            )


def validate(staged: Staged, store: SnapshotStore, settings: Settings) -> Validation:
    """Check staged battles, alone and together with the snapshot they would join.

    Raises
    ------
    ValidationError
        If a part is not in the battle schema, or an expectation could not be evaluated.
    """
    rules = settings.validation
    frame = _frame(_schema_checked(staged.parts), rules)
    row_rules = [rule for rule in RULES if rule.kind == "row"]
    failing = {rule.name: ~_ok(frame[rule.column].to_numpy(), rule, rules) for rule in row_rules}
    first_failed = np.full(len(frame), "", dtype=object)
    for rule in reversed(row_rules):
        first_failed[failing[rule.name]] = rule.name
    checked, quarantine = _divide(staged, settings, first_failed, frame)
    by_rule = {
        str(name): int(n)
        for name, n in zip(*np.unique(first_failed[first_failed != ""].astype(str),
                                      return_counts=True), strict=True)
    }  # fmt: skip
    fresh = profile(_light(checked))
    before = _previous_profile(staged.previous, store)
    whole = merge(before, fresh) if before else fresh
    figures = set_figures(whole, fresh, before, sum(by_rule.values()))
    with _alone(settings):
        results, docs = _run(frame, figures, settings, failing)
    return Validation(
        passed=not any(
            not r.passed for r in results if r.kind == "set" and r.severity == "critical"
        ),
        rules=results,
        checked_parts=tuple(checked),
        quarantined_by_rule=by_rule,
        quarantine_path=quarantine,
        data_docs=docs,
        profile=whole,
    )


def _root(settings: Settings) -> Path:
    return settings.home / "gx"


def data_docs(settings: Settings) -> Path | None:
    """Return the index page of the Data Docs, if any were built."""
    page = _root(settings) / "gx" / "uncommitted" / "data_docs" / "local_site" / "index.html"
    return page if page.exists() else None


def validate_snapshot(manifest: Manifest, store: SnapshotStore, settings: Settings) -> Validation:
    """Check a published snapshot again, under the rules as they are set now."""
    store.verify(manifest)
    rules = settings.validation
    frame = _frame(store.iter_batches(manifest), rules)
    failing = {
        rule.name: ~_ok(frame[rule.column].to_numpy(), rule, rules)
        for rule in RULES
        if rule.kind == "row"
    }
    whole = profile(store.iter_batches(manifest, COLUMNS))
    figures = set_figures(whole, whole, None, 0)
    with _alone(settings):
        results, docs = _run(frame, figures, settings, failing)
    critical = [r for r in results if r.severity == "critical"]
    return Validation(all(r.passed for r in critical), results, data_docs=docs, profile=whole)


def _schema_checked(parts: Sequence[Path]) -> Iterator[pa.RecordBatch]:
    for path in parts:
        with pq.ParquetFile(path) as file:
            if not file.schema_arrow.equals(BATTLE_SCHEMA):
                raise ValidationError(
                    f"{path.name} is not in the battle schema: found {file.schema_arrow.names}, "
                    f"expected {BATTLE_SCHEMA.names}; ingest the source again"
                )
            yield from file.iter_batches()


def _light(parts: Sequence[Path]) -> Iterator[pa.RecordBatch]:
    for path in parts:
        with pq.ParquetFile(path) as file:
            yield from file.iter_batches(columns=list(COLUMNS))


def _previous_profile(previous: Manifest | None, store: SnapshotStore) -> Profile | None:
    if previous is None:
        return None
    kept: Profile | None = previous.validation.get("profile")
    return kept or profile(store.iter_batches(previous, COLUMNS))


def _frame(batches: Iterable[pa.RecordBatch], settings: ValidationSettings) -> pd.DataFrame:
    """Return what row rules look at: one narrow row per battle, no prompt text."""
    import pandas as pd

    pieces = []
    for batch in batches:
        prompt = batch.column("prompt").fill_null("")
        chars = pc.utf8_length(prompt)
        bad = pc.count_substring(prompt, "\ufffd")
        is_text = pc.and_(
            pc.invert(pc.match_substring(prompt, "\x00")),
            pc.less_equal(pc.cast(bad, pa.float64()),
                          pc.multiply(pc.cast(chars, pa.float64()), _REPLACEMENT_SHARE)),
        )  # fmt: skip
        a, b = batch.column("model_a").fill_null(""), batch.column("model_b").fill_null("")
        pieces.append(
            pa.table(
                {
                    "battle_id": batch.column("battle_id"),
                    "models_named": pc.and_(pc.not_equal(a, ""), pc.not_equal(b, "")),
                    "models_differ": pc.not_equal(a, b),
                    "winner": batch.column("winner").fill_null(""),
                    "preference_a": batch.column("preference_a").fill_null(-1.0),
                    "prompt_not_empty": pc.not_equal(pc.utf8_trim_whitespace(prompt), ""),
                    "prompt_chars": chars,
                    "prompt_text": is_text,
                    "label_kind": batch.column("label_kind").fill_null(""),
                }
            )
        )
    if not pieces:
        return pd.DataFrame({r.column: pd.Series(dtype="object") for r in RULES if r.kind == "row"})
    table = pa.concat_tables(pieces)
    frame: pd.DataFrame = table.to_pandas(
        categories=["winner", "label_kind"], ignore_metadata=True, self_destruct=True
    ).astype({"winner": "object", "label_kind": "object"})
    return frame


def _ok(values: np.ndarray[Any, Any], rule: Rule, settings: ValidationSettings) -> Any:
    """Return which rows meet a row rule, as a mask (n,)."""
    import pandas as pd

    if rule.name == "id_unique":
        return ~pd.Series(values).duplicated(keep=False).to_numpy()
    bounds = rule.bounds(settings)
    if bounds is None:
        return np.isin(values.astype(object), rule.values()) if len(values) else values == 0
    numbers = values.astype(np.float64)
    low, high = (np.inf * s if b is None else b for b, s in zip(bounds, (-1, 1), strict=True))
    return (numbers >= low) & (numbers <= high)


def _divide(
    staged: Staged, settings: Settings, first_failed: Any, frame: pd.DataFrame
) -> tuple[list[Path], Path | None]:
    """Write the rows that passed beside the staged parts, and the others to quarantine."""
    checked: list[Path] = []
    bad: list[pa.Table] = []
    start = 0
    for path in staged.parts:
        table = pq.read_table(path)
        why = first_failed[start : start + len(table)]
        failed = why != ""
        if failed.any():
            rows = table.filter(pa.array(failed))
            reasons = why[failed]
            columns = {rule.name: rule.column for rule in RULES}
            some = frame.iloc[start : start + len(table)][failed]
            found = [str(some[columns[r]].iloc[i]) for i, r in enumerate(reasons)]
            bad.append(
                rows.append_column("rule", pa.array(reasons, pa.string())).append_column(
                    "found", pa.array(found, pa.string())
                )
            )
            path = path.with_name(f"checked-{path.name}")
            pq.write_table(table.filter(pa.array(~failed)), path, compression="zstd")
        checked.append(path)
        start += len(table)
    if not bad:
        return checked, None
    settings.quarantine_dir.mkdir(parents=True, exist_ok=True)
    target = settings.quarantine_dir / f"{staged.directory.name}.parquet"
    temporary = target.with_suffix(".tmp")
    pq.write_table(pa.concat_tables(bad), temporary, compression="zstd")
    temporary.replace(target)
    return checked, target


def _alone(settings: Settings) -> AbstractContextManager[None]:
    return alone(settings.home / "locks" / "validate")


def _run(
    frame: pd.DataFrame,
    figures: dict[str, float],
    settings: Settings,
    failing: dict[str, Any],
) -> tuple[tuple[RuleResult, ...], Path | None]:
    """Run the suites and build the Data Docs; the caller holds the lock, for files are shared."""
    os.environ.setdefault("GX_ANALYTICS_ENABLED", "false")
    import logging

    logging.getLogger("great_expectations").setLevel(logging.WARNING)
    import great_expectations as gx
    import pandas as pd
    from great_expectations.checkpoint import UpdateDataDocsAction

    root = _root(settings)
    root.mkdir(parents=True, exist_ok=True)
    # made anew, since one that was killed here may have left them half-written, and Great
    # Expectations would never get past that; what it found before, and the Data Docs, stay
    for folder in ("expectations", "validation_definitions", "checkpoints"):
        shutil.rmtree(root / "gx" / folder, ignore_errors=True)
    for file in ("great_expectations.yml", "uncommitted/config_variables.yml"):
        (root / "gx" / file).unlink(missing_ok=True)
    context = gx.get_context(mode="file", project_root_dir=root)
    context.variables.progress_bars = {"globally": False}
    frames = {"row": frame, "set": pd.DataFrame([figures])}
    results: list[RuleResult] = []
    source = context.data_sources.add_or_update_pandas("battles")
    for kind, data in frames.items():
        rules = [rule for rule in RULES if rule.kind == kind]
        if kind == "row" and not len(data):
            continue
        batch = source.add_dataframe_asset(kind).add_batch_definition_whole_dataframe("all")
        suite = context.suites.add_or_update(
            gx.ExpectationSuite(
                name=f"{kind}_rules",
                expectations=[rule.expectation(settings.validation) for rule in rules],
            )
        )
        definition = context.validation_definitions.add_or_update(
            gx.ValidationDefinition(name=f"{kind}_rules", data=batch, suite=suite)
        )
        checkpoint = context.checkpoints.add_or_update(
            gx.Checkpoint(
                name=f"{kind}_rules",
                validation_definitions=[definition],
                actions=[UpdateDataDocsAction(name="docs")],
                result_format={"result_format": "SUMMARY", "partial_unexpected_count": 0},
            )
        )
        outcome = checkpoint.run(batch_parameters={"dataframe": data})
        for one in next(iter(outcome.run_results.values())).results:
            results.append(_read_result(one, settings.validation, failing, figures, len(data)))
    return tuple(results), data_docs(settings)


def _read_result(
    one: Any, settings: ValidationSettings, failing: dict[str, Any], figures: Any, n: int
) -> RuleResult:
    name = one.expectation_config.meta["rule"]
    rule = next(r for r in RULES if r.name == name)
    info = one.exception_info or {}
    raised = info.get("raised_exception") or any(
        isinstance(v, dict) and v.get("raised_exception") for v in info.values()
    )
    if raised:
        raise ValidationError(
            f"the rule {name} could not be evaluated: Great Expectations raised an exception on "
            f"column {rule.column}; nothing was added to the snapshot"
        )
    if rule.kind == "set":
        value = figures[rule.column]
        observed = f"{value:,.0f}" if value.is_integer() else f"{value:.4g}"
        failed = 0
    else:
        failed = int(one.result.get("unexpected_count", 0))
        if failed != int(failing[name].sum()):
            raise ValidationError(
                f"the rule {name} counted {failed} failing rows in Great Expectations and "
                f"{int(failing[name].sum())} here: nothing was added to the snapshot; report this"
            )
        observed = f"{failed:,} of {n:,} fail" if failed else f"all {n:,} pass"
    return RuleResult(
        name, rule.kind, rule.severity, bool(one.success), observed, rule.expected(settings), failed
    )
