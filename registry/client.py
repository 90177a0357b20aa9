"""The registry: versions of the router, the aliases that point at them, and who moved them.

Only this module moves an alias. A move takes a file lock, looks again at where the alias points,
sets ``previous`` before ``champion`` (readers never see no champion), and is written down in the
registered model's tags and in ``history.jsonl``.
"""

from __future__ import annotations

import contextlib
import fcntl
import getpass
import json
import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from registry.gate import Decision
from routellm.bundle import Bundle, load_bundle
from routellm.errors import RegistryError, UsageError
from routellm.evaluation.evaluate import Evaluation
from routellm.gateway.source import VersionRef
from routellm.settings import Settings

CHAMPION, CHALLENGER, PREVIOUS = "champion", "challenger", "previous"
_STATE_TAG = "routellm.champion"  # JSON: the decision in force, and the versions before it
_KEPT = 50  # versions a rollback can go back through


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

    # --- reading ---------------------------------------------------------------------------

    def versions(self) -> list[VersionInfo]:
        """Return all versions, newest first."""
        with _said(self.settings):
            aliases: dict[str, list[str]] = {}
            for alias, version in self._aliases().items():
                aliases.setdefault(str(version), []).append(alias)
            found = self.client.search_model_versions(f"name='{self.model}'", max_results=1000)
        infos = [_info(v, tuple(sorted(aliases.get(str(v.version), [])))) for v in found]
        return sorted(infos, key=lambda v: -int(v.version))

    def get(self, name: str) -> VersionInfo:
        """Return a version by number or alias.

        Raises
        ------
        UsageError
            If there is none.
        """
        number = self._aliases().get(name, name)
        for one in self.versions():
            if one.version == str(number):
                return one
        have = ", ".join(v.version for v in self.versions()) or "none"
        raise UsageError(f"no version or alias {name!r} of {self.model}: it has versions {have}")

    def champion(self) -> VersionInfo | None:
        """Return the version that gateways serve, or None."""
        number = self._aliases().get(CHAMPION)
        return self.get(str(number)) if number is not None else None

    def state(self) -> dict[str, Any]:
        """Return the decision in force: ``version, at, by, why, before`` (versions before it)."""
        with _said(self.settings):
            model = self._registered_model()
        raw = model.tags.get(_STATE_TAG) if model is not None else None
        return dict(json.loads(raw)) if raw else {}

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

        with _said(self.settings):
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

        with _said(self.settings):
            doc = mlflow.artifacts.load_dict(f"runs:/{version.run_id}/evaluations.json")
        return {name: Evaluation.from_dict(one) for name, one in doc.items()}

    def run_metrics(self, version: VersionInfo) -> dict[str, float]:
        """Return a version's metrics as logged on its run."""
        with _said(self.settings):
            return dict(self.client.get_run(version.run_id).data.metrics)

    def bundle(self, version: VersionInfo, *, cache_path: Path | None = None) -> Bundle:
        """Download a version's bundle and load it.

        Raises
        ------
        BundleError
            If its files are damaged.
        """
        import mlflow

        with _said(self.settings):
            folder = mlflow.artifacts.download_artifacts(f"models:/{self.model}/{version.version}")
        return load_bundle(Path(folder) / "artifacts" / "bundle", cache_path=cache_path)

    def history(self) -> list[dict[str, Any]]:
        """Return every alias move made from this home, oldest first."""
        path = self.settings.home / "history.jsonl"
        if not path.exists():
            return []
        return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]

    # --- moving aliases --------------------------------------------------------------------

    def promote(
        self,
        version: VersionInfo,
        decision: Decision | None = None,
        *,
        force_reason: str | None = None,
        expected: str | None = None,
    ) -> None:
        """Make a version champion.

        Parameters
        ----------
        decision : Decision
            The gate's verdict; needed unless `force_reason` is given.
        expected : str, optional
            The champion's version that the decision was made against; if another took its place
            in the meantime, nothing is moved.

        Raises
        ------
        UsageError
            If the decision is not to promote and no reason to force is given.
        RegistryError
            If the champion changed since the decision.
        """
        if force_reason is None and (decision is None or decision.outcome != "promote"):
            why = decision.reason if decision else "no gate has looked at it"
            raise UsageError(
                f"version {version.version} was not promoted: {why}; to promote it all the same, "
                "give --force --reason"
            )
        why = f"forced: {force_reason}"
        if force_reason is None and decision is not None:
            why = decision.reason
        with self._lock():
            now = self._aliases().get(CHAMPION)
            if force_reason is None and str(now or "") != str(expected or ""):
                raise RegistryError(
                    f"the champion moved from {expected or 'none'} to {now or 'none'} while "
                    f"version {version.version} was being judged: promote it again"
                )
            if str(now) == version.version:
                raise UsageError(f"version {version.version} is the champion already")
            before = [b for b in self.state().get("before", []) if b != version.version]
            if now is not None:
                before = [str(now), *before][:_KEPT]
            self._move(version.version, before, why, decision)

    def rollback(self, to: str | None = None) -> VersionInfo:
        """Take the champion back to where it was (or to version `to`), without a gate.

        Raises
        ------
        UsageError
            If there is nothing to go back to.
        """
        with self._lock():
            before = [str(b) for b in self.state().get("before", [])]
            if to is not None:
                target = self.get(to).version
                now = self.champion()
                if now is not None and now.version == target:
                    raise UsageError(f"version {target} is the champion already")
            elif before:
                target = before[0]
            else:
                raise UsageError(
                    f"nothing to roll back to: {self.model} has had no champion before this one; "
                    "name a version with --to"
                )
            info = self.get(target)
            rest = before[before.index(target) + 1 :] if target in before else before
            self._move(target, rest, "rollback", None)
            return info

    def set_challenger(self, version: VersionInfo) -> None:
        """Put a version in line."""
        with self._lock(), _said(self.settings):
            self.client.set_registered_model_alias(self.model, CHALLENGER, version.version)

    def _move(self, to: str, before: list[str], why: str, decision: Decision | None) -> None:
        now = self._aliases().get(CHAMPION)
        entry = {
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
            "by": os.environ.get("ROUTELLM_USER") or getpass.getuser(),
            "from": None if now is None else str(now),
            "to": to,
            "why": why,
            "decision": decision.to_dict() if decision else None,
        }
        state = {"version": to, "at": entry["at"], "by": entry["by"], "why": why, "before": before}
        with _said(self.settings):
            if before:
                self.client.set_registered_model_alias(self.model, PREVIOUS, before[0])
            elif PREVIOUS in self._aliases():
                self.client.delete_registered_model_alias(self.model, PREVIOUS)
            self.client.set_registered_model_alias(self.model, CHAMPION, to)
            self.client.set_registered_model_tag(self.model, _STATE_TAG, json.dumps(state))
            if self._aliases().get(CHALLENGER) == to:
                self.client.delete_registered_model_alias(self.model, CHALLENGER)
        path = self.settings.home / "history.jsonl"
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())

    # --- for the gateway -------------------------------------------------------------------

    def current(self) -> VersionRef | None:
        """Return what the gateway's alias points at now, or None (a `RouterSource`)."""
        number = self._aliases().get(self.settings.gateway.alias)
        return None if number is None else VersionRef(self.model, str(number))

    def load(self, ref: VersionRef) -> Bundle:
        """Load the version that `ref` names (a `RouterSource`)."""
        return self.bundle(self.get(ref.version), cache_path=self.settings.embeddings_path)

    # --- inside ----------------------------------------------------------------------------

    def _registered_model(self) -> Any:
        from mlflow.exceptions import MlflowException

        try:
            return self.client.get_registered_model(self.model)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise

    def _aliases(self) -> dict[str, str]:
        with _said(self.settings):
            model = self._registered_model()
        return {k: str(v) for k, v in model.aliases.items()} if model is not None else {}

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        self.settings.home.mkdir(parents=True, exist_ok=True)
        with (self.settings.home / "promotion.lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


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
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)
    uri = settings.resolved_tracking_uri
    if uri.startswith("sqlite:///"):
        Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    import mlflow
    from mlflow.exceptions import MlflowException

    for name in ("mlflow", "alembic"):  # importing MLflow sets its own level
        logging.getLogger(name).setLevel(logging.ERROR)
    with _said(settings):
        mlflow.set_tracking_uri(uri)
        mlflow.set_registry_uri(uri)
        client = mlflow.MlflowClient(uri, uri)
        if client.get_experiment_by_name(settings.experiment) is None:
            local = None if settings.tracking_uri else (settings.home / "mlartifacts").resolve()
            with contextlib.suppress(MlflowException):  # made by another process just now
                client.create_experiment(
                    settings.experiment, artifact_location=local.as_uri() if local else None
                )
        mlflow.set_experiment(settings.experiment)
        registry = Registry(settings, client)
        if registry._registered_model() is None:
            with contextlib.suppress(MlflowException):
                client.create_registered_model(
                    settings.model, description="LLM routers trained by RouteLLM Ops"
                )
    return registry


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


@contextlib.contextmanager
def _said(settings: Settings) -> Iterator[None]:
    """Turn what MLflow raises into one sentence."""
    from mlflow.exceptions import MlflowException
    from requests.exceptions import RequestException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (MlflowException, RequestException, SQLAlchemyError, OSError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise RegistryError(
            f"MLflow at {_redacted(settings.resolved_tracking_uri)} did not do what was asked "
            f"({_redacted(first)[:200]}): check that it runs and that `tracking_uri` is right"
        ) from error


def _redacted(text: str) -> str:
    """Return text with the user and password of every address in it hidden."""
    return re.sub(r"//[^@/\s]*@", "//***@", text)
