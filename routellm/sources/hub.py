"""Battles from a Hugging Face dataset, at an exact revision."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa

from routellm.errors import SourceError, SourceUnreachable
from routellm.settings import IngestSettings
from routellm.sources.base import NOTHING
from routellm.sources.files import _format, read_file


class HubSource:
    """A dataset repository on the hub, or on another endpoint that speaks its protocol.

    Without a revision the current commit is looked up and recorded, so that a snapshot always
    names exactly what it was made from. Files are downloaded by ``huggingface_hub`` (which
    resumes and caches) and read as files: no code of the repository is run.
    """

    simulated = False
    passed_over: Mapping[str, str] = NOTHING

    def __init__(self, repo: str, revision: str | None, settings: IngestSettings) -> None:
        self.repo = repo
        self.revision = revision
        self.name = f"hf://{repo}"
        self._settings = settings

    def cursor(self) -> dict[str, Any]:
        return {"revision": self._info[0]}

    def batches(self, since: dict[str, Any] | None) -> Iterator[pa.RecordBatch]:
        revision, files = self._info
        for file in files:
            path = self._download(file, revision)
            for label, battles in read_file(path, self._settings, source=self.name):
                if battles is None:
                    raise SourceError(f"{self.name} ({label}) is a benchmark, not battles")
                yield from battles

    @cached_property
    def _info(self) -> tuple[str, list[str]]:
        from huggingface_hub import HfApi

        try:
            info = HfApi(endpoint=self._settings.hub_endpoint).dataset_info(
                self.repo, revision=self.revision, timeout=30
            )
        except Exception as error:
            raise self._unreachable(error) from error
        files = sorted(s.rfilename for s in info.siblings or [] if _format(s.rfilename))
        if not files:
            raise SourceError(
                f"{self.name} at {info.sha} has no CSV, Parquet or JSON Lines file: name a dataset "
                "that stores its rows in one of these"
            )
        return str(info.sha), files

    def _download(self, file: str, revision: str) -> Path:
        from huggingface_hub import hf_hub_download

        try:
            return Path(
                hf_hub_download(
                    self.repo,
                    file,
                    repo_type="dataset",
                    revision=revision,
                    endpoint=self._settings.hub_endpoint,
                )
            )
        except Exception as error:
            raise self._unreachable(error) from error

    def _unreachable(self, error: Exception) -> SourceError:
        why = type(error).__name__
        if why in {"RepositoryNotFoundError", "RevisionNotFoundError", "GatedRepoError"}:
            return SourceError(
                f"the hub refuses {self.name} at revision {self.revision or 'main'} ({why}): check "
                "the name, accept the dataset's terms there and set HF_TOKEN"
            )
        return SourceUnreachable(
            f"{self.name} cannot be fetched from the Hugging Face hub ({why}): check the network, "
            "or download the dataset and give its folder"
        )
