"""The registry: versions of the router, the aliases that point at them, and who moved them.

This module reads; `registry.moves` moves aliases, and nothing else does; `registry.history` keeps
what was decided and moved.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from registry import moves, promotion
from registry.calls import patient, said, versions_of
from registry.chain import History
from registry.database import make_database
from registry.gate import Decision
from registry.history import CHAMPION, Entry, replay, serving_at
from registry.moves import Smoke
from routellm.errors import UsageError
from routellm.gateway.source import VersionRef
from routellm.settings import Settings

if TYPE_CHECKING:  # most verbs load no router
    from routellm.bundle import Bundle
    from routellm.evaluation.evaluate import Evaluation


@dataclass(frozen=True)
class VersionInfo:
    """A registered version."""

    version: str
    run_id: str
    kind: str
    aliases: tuple[str, ...]
    created_at: str
    tags: dict[str, str]

    @property
    def simulated(self) -> bool:
        return self.tags.get("simulated") == "true"


class Registry:
    """A registered model in one MLflow; made by `connect`."""

    def __init__(self, settings: Settings, client: Any) -> None:
        self.settings = settings
        self.client = client
        self.model = settings.model
        self.entries = History(settings, client)

    @property
    def notices(self) -> list[str]:
        """What whoever asked for a move should be told: what was mended, what failed."""
        return self.entries.notices

    # --- reading ---------------------------------------------------------------------------

    def versions(self) -> list[VersionInfo]:
        """Return all versions, newest first."""
        aliases: dict[str, list[str]] = {}
        for alias, version in self.aliases().items():
            aliases.setdefault(version, []).append(alias)
        found = versions_of(self.settings, self.client, self.model)
        infos = [_info(v, tuple(sorted(aliases.get(str(v.version), [])))) for v in found]
        return sorted(infos, key=lambda v: -int(v.version))

    def get(self, name: str) -> VersionInfo:
        """Return a version by number or alias.

        Raises
        ------
        UsageError
            If there is none.
        """
        number = self.aliases().get(name, name)
        for one in self.versions():
            if one.version == str(number):
                return one
        have = ", ".join(v.version for v in self.versions()) or "none"
        raise UsageError(f"no version or alias {name!r} of {self.model}: it has versions {have}")

    def champion(self) -> VersionInfo | None:
        """Return the version that gateways serve, or None."""
        number = self.aliases().get(CHAMPION)
        return self.get(str(number)) if number is not None else None

    def aliases(self) -> dict[str, str]:
        """Return what each alias points at: alias -> version."""
        model = patient(self.settings, self._registered_model)
        return {k: str(v) for k, v in model.aliases.items()} if model is not None else {}

    def find_trained(self, training_key: str) -> VersionInfo | None:
        """Return the version that this very work made before, or None."""
        return next(
            (v for v in self.versions() if v.tags.get("training_key") == training_key), None
        )

    def trial_evaluations(self, training_key: str) -> dict[str, Evaluation] | None:
        """Return the evaluations of a trial that was run before, by benchmark, or None.

        A trial is a router that was trained to be compared and has no version.
        """
        import mlflow

        from routellm.evaluation.evaluate import Evaluation

        with said(self.settings):
            experiment = self.client.get_experiment_by_name(self.settings.experiment)
            if experiment is None:
                return None
            runs = self.client.search_runs(
                [experiment.experiment_id],
                f"tags.training_key = '{training_key}' and attributes.status = 'FINISHED'",
                max_results=1,
            )
            if not runs:
                return None
            doc = mlflow.artifacts.load_dict(f"runs:/{runs[0].info.run_id}/evaluations.json")
        return {name: Evaluation.from_dict(one) for name, one in doc.items()}

    def evaluations(self, version: VersionInfo) -> dict[str, Evaluation]:
        """Return a version's evaluations, by benchmark."""
        import mlflow

        from routellm.evaluation.evaluate import Evaluation

        file = f"runs:/{version.run_id}/evaluations.json"
        doc = patient(self.settings, partial(mlflow.artifacts.load_dict, file))
        return {name: Evaluation.from_dict(one) for name, one in doc.items()}

    def run_metrics(self, version: VersionInfo) -> dict[str, float]:
        """Return a version's metrics as logged on its run."""
        run = patient(self.settings, partial(self.client.get_run, version.run_id))
        return dict(run.data.metrics)

    def bundle(self, version: VersionInfo, *, cache_path: Path | None = None) -> Bundle:
        """Download a version's bundle and load it.

        Raises
        ------
        BundleError
            If its files are damaged.
        """
        import mlflow

        from routellm.bundle import load_bundle

        with said(self.settings):
            folder = mlflow.artifacts.download_artifacts(f"models:/{self.model}/{version.version}")
        return load_bundle(Path(folder) / "artifacts" / "bundle", cache_path=cache_path)

    # --- the history -----------------------------------------------------------------------

    def history(self) -> list[Entry]:
        """Return every decision and move, oldest first, verified.

        Raises
        ------
        RegistryError
            If an entry was edited, taken out or cut off.
        """
        return list(self.entries.read().entries)

    def state(self) -> dict[str, Any]:
        """Return the decision in force: ``version, at, by, why, before`` (versions before it).

        Empty if there has been no champion. A move that is not finished counts once the alias
        points where it leads.
        """
        entries = self.entries.read().entries
        if entries and not entries[-1].applied:
            moved = CHAMPION in entries[-1].aliases
            if not moved or self.aliases().get(CHAMPION) != entries[-1].to:
                entries = entries[:-1]
        standing = replay(entries)
        made = standing.entry
        if made is None:
            return {}
        return {
            "version": standing.champion,
            "at": made.since,
            "by": made.by,
            "why": made.reason,
            "before": list(standing.before),
        }

    def serving_at(self, when: datetime) -> Entry | None:
        """Return the entry whose ``to`` was champion at a time, or None if there was none yet.

        A time that names no zone is local.
        """
        return serving_at(self.history(), when)

    def unsettled(self) -> str | None:
        """Return in words what a move would mend first, or None; it changes nothing."""
        return moves.unsettled(self)

    # --- moving aliases --------------------------------------------------------------------

    def promote(
        self,
        version: VersionInfo,
        decision: Decision | None = None,
        *,
        force_reason: str | None = None,
        expected: str | None = None,
        smoke: Smoke | None = None,
    ) -> Entry:
        """Make a version champion, check that it works, and go back if it does not.

        Parameters
        ----------
        decision : Decision
            The gate's verdict; needed unless `force_reason` is given.
        expected : str, optional
            The champion's version that the decision was made against; if another took its place
            in the meantime, nothing is moved.
        smoke : Callable, optional
            Given a model URI, returns None or why it does not work; by default the version is
            loaded and asked in a clean process (`registry.smoke`).

        Raises
        ------
        UsageError
            If the decision is not to promote and no reason to force is given, or the version is
            champion already or was deleted.
        RegistryError
            If the champion changed since the decision, MLflow does not answer, or the version
            failed its smoke check; the message says who is champion.
        """
        return promotion.promote(
            self, version, decision, force_reason=force_reason, expected=expected, smoke=smoke
        )

    def rollback(self, to: str | None = None, *, smoke: Smoke | None = None) -> VersionInfo:
        """Take the champion back to where it was (or to version `to`), without a gate.

        Raises
        ------
        UsageError
            If there is nothing to go back to, or it was deleted.
        RegistryError
            As `promote`.
        """
        entry = promotion.rollback(self, to, smoke=smoke)
        return self.get(str(entry.to))

    def set_challenger(self, version: VersionInfo) -> Entry:
        """Put a version in line."""
        return promotion.set_challenger(self, version)

    def record(self, version: VersionInfo, decision: Decision) -> Entry:
        """Write down that a version was not promoted.

        One whose verdict is inconclusive is put in line; one that was in line and is rejected
        leaves it.
        """
        return promotion.record(self, version, decision)

    def repair(self, *, smoke: Smoke | None = None) -> str | None:
        """Finish what was cut short, write down what others moved; returns in words what, or None.

        Every move does this first.
        """
        return moves.repair(self, smoke)

    def smoke(self, uri: str) -> str | None:
        """Load a version in a clean process and ask it; returns why it does not work, or None."""
        from registry.smoke import failure

        return failure(self.settings)(uri)

    # --- for the gateway -------------------------------------------------------------------

    def current(self) -> VersionRef | None:
        """Return what the gateway's alias points at now, or None (a `RouterSource`)."""
        number = self.aliases().get(self.settings.gateway.alias)
        return None if number is None else VersionRef(self.model, str(number))

    def load(self, ref: VersionRef) -> Bundle:
        """Load the version that `ref` names (a `RouterSource`)."""
        return self.bundle(self.get(ref.version), cache_path=self.settings.embeddings_path)

    def log_to(self, experiment: str) -> None:
        """Let runs that begin from here on belong to an experiment, which is made if need be."""
        import mlflow

        if self.client.get_experiment_by_name(experiment) is None:
            # a server keeps artifacts itself; a bare database would leave them where it is run
            served = self.settings.resolved_tracking_uri.startswith(("http://", "https://"))
            local = None if served else (self.settings.home / "mlartifacts").resolve().as_uri()
            with _made_just_now():
                self.client.create_experiment(experiment, artifact_location=local)
        mlflow.set_experiment(experiment)

    # --- inside ----------------------------------------------------------------------------

    def _registered_model(self) -> Any:
        from mlflow.exceptions import MlflowException

        try:
            return self.client.get_registered_model(self.model)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise


def connect(settings: Settings) -> Registry:
    """Connect to MLflow and make sure of the registered model and the experiment.

    Raises
    ------
    RegistryError
        If it does not answer within seconds.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # stdout is for JSON
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)
    uri = settings.resolved_tracking_uri
    import mlflow

    for name in ("mlflow", "alembic"):  # importing MLflow sets its own level
        logging.getLogger(name).setLevel(logging.ERROR)
    # it would print a traceback before it raises what `said` makes a sentence of
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)

    def reach() -> Registry:
        make_database(uri)
        mlflow.set_tracking_uri(uri)
        mlflow.set_registry_uri(uri)
        client = mlflow.MlflowClient(uri, uri)
        registry = Registry(settings, client)
        registry.log_to(settings.experiment)
        if registry._registered_model() is None:
            with _made_just_now():
                client.create_registered_model(
                    settings.model, description="LLM routers trained by RouteLLM Ops"
                )
        return registry

    return patient(settings, reach)


@contextlib.contextmanager
def _made_just_now() -> Iterator[None]:
    """Make something, unless another process was faster."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _info(version: Any, aliases: tuple[str, ...]) -> VersionInfo:
    created = datetime.fromtimestamp(version.creation_timestamp / 1000, UTC)
    return VersionInfo(
        version=str(version.version),
        run_id=version.run_id,
        kind=version.tags.get("kind", "?"),
        aliases=aliases,
        created_at=created.isoformat(timespec="seconds"),
        tags=dict(version.tags),
    )
