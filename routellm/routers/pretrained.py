"""A pretrained language model that a router is built on: where it lies, or why it is not to be had.

A model is a local folder or a name on the Hugging Face hub. What a router was trained on is told
by content: a hub commit, or the SHA-256 of a folder's files.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from routellm.errors import BundleError, TrainingError
from routellm.snapshots import file_sha256

_HUB_TIMEOUT_S = 5.0
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
# what is fetched of a repository: nothing pickled, and no weights a second time
_PATTERNS: dict[str, Any] = {
    "allow_patterns": ["*.json", "*.safetensors", "*.txt", "*.model"],
    "ignore_patterns": ["*/*", "consolidated*"],
}


@dataclass(frozen=True)
class Base:
    """A pretrained model on this machine.

    Attributes
    ----------
    folder : Path
    name : str
        Hub name, or a local folder's own name.
    revision : str
        Hub commit, "" for a local folder.
    sha256 : str
        Digest of a local folder's files, "" for a hub commit, which is one by itself.
    """

    folder: Path
    name: str
    revision: str
    sha256: str

    def to_doc(self) -> dict[str, str]:
        """Return what `Pretrained.same` needs to find this very base again."""
        return {"model": self.name, "revision": self.revision, "sha256": self.sha256}


@dataclass(frozen=True)
class Pretrained:
    """A pretrained model as the options of a router kind name it.

    Attributes
    ----------
    model : str
        Local folder, or hub name.
    revision : str
        Hub revision; a folder has none.
    endpoint : str or None
        Another hub than the usual one.
    setting : str
        Where the options are, e.g. ``training.options.causal_llm``: errors say it.
    """

    model: str
    revision: str
    endpoint: str | None
    setting: str

    def unavailable(self) -> str:
        """Return in one sentence why the model cannot be had, or "" if it can: within seconds."""
        try:
            return "" if self._here() else self._asked_of_hub()
        except TrainingError as error:
            return str(error)

    def get(self) -> Base:
        """Return the model, fetched from the hub if it is not here yet.

        Raises
        ------
        TrainingError
            If it is neither here nor to be had.
        """
        folder = self._here()
        if folder and self._is_folder:
            return Base(folder, folder.resolve().name, "", _folder_sha256(folder))
        if not folder:
            folder = self._fetched()
            if lacking := _lacking(folder):
                raise TrainingError(
                    f"{self.model} has no {lacking}: name a model with safetensors weights in "
                    f"`{self.setting}.model`"
                )
        return Base(folder, self.model, folder.name, "")

    def same(self, trained_on: Mapping[str, str], kind: str) -> Base:
        """Return the model that a router of a kind was trained on (`Base.to_doc`), and no other.

        A hub model is taken from the hub or its cache, at the commit it was trained on. A local
        folder is looked for where it lay in training and, on a machine that has it elsewhere, in
        the working directory under its own name: there a copy or a link will do. Only a folder
        with the same SHA-256 is taken.

        Raises
        ------
        BundleError
            If another one is named here, or it cannot be had.
        """
        model, revision, sha256 = (trained_on[k] for k in ("model", "revision", "sha256"))
        if sha256:
            return self._same_folder(model, sha256, kind)
        if self._is_folder or self.model != model:
            raise BundleError(
                f"this {kind} router was trained on {model} ({revision[:12]}) and {self.model} is "
                f"not that: name its base model in `{self.setting}.model`"
            )
        try:  # at the commit it was trained on, wherever a branch has moved since
            return replace(self, revision=revision).get()
        except TrainingError as error:
            raise BundleError(f"this {kind} router needs its base model: {error}") from error

    def _same_folder(self, name: str, sha256: str, kind: str) -> Base:
        places = dict.fromkeys((Path(self.model), Path.cwd() / name))
        others = []
        for folder in places:
            if not folder.is_dir():
                continue
            try:
                found = replace(self, model=str(folder)).get()
            except TrainingError as error:
                raise BundleError(f"this {kind} router needs its base model: {error}") from error
            if found.sha256 == sha256:  # its name is the one it was trained under
                return replace(found, name=name)
            others.append(f"{folder} has SHA-256 {found.sha256[:12]}")
        raise BundleError(
            f"this {kind} router was trained on {name} (SHA-256 {sha256}), and "
            f"{' and '.join(others) or f'{self.model} is not here'}: put that model, or a link to "
            f"it, at {' or '.join(map(str, places))}"
        )

    @property
    def _is_folder(self) -> bool:
        return Path(self.model).is_dir()

    def _here(self) -> Path | None:
        """Return where the model lies whole on this machine, as a folder or in the hub's cache."""
        if self._is_folder:
            folder = Path(self.model)
            if lacking := _lacking(folder):
                raise TrainingError(
                    f"{folder} has no {lacking}: name a model's folder, with config.json, "
                    f"tokenizer and safetensors weights, in `{self.setting}.model`"
                )
            return folder
        from huggingface_hub import snapshot_download

        try:
            cached = Path(
                snapshot_download(
                    self.model, revision=self.revision, local_files_only=True, **_PATTERNS
                )
            )
            return None if _lacking(cached) else cached
        except Exception:  # no such name, revision or file in the cache, or not whole
            return None

    def _fetched(self) -> Path:
        from huggingface_hub import snapshot_download

        if refusal := self._asked_of_hub():  # a download would first try for half a minute
            raise TrainingError(refusal)
        try:
            return Path(
                snapshot_download(
                    self.model, revision=self.revision, endpoint=self.endpoint, **_PATTERNS
                )
            )
        except Exception as error:
            raise TrainingError(self._refusal(error)) from error

    def _asked_of_hub(self) -> str:
        """Return why the hub will not give the model, or "" if it will."""
        from huggingface_hub import get_hf_file_metadata, hf_hub_url

        answer = self._refusal(TimeoutError())

        def ask() -> None:
            nonlocal answer
            try:  # what a download begins with: it needs the terms accepted where there are any
                url = hf_hub_url(
                    self.model, "config.json", revision=self.revision, endpoint=self.endpoint
                )
                get_hf_file_metadata(url, timeout=_HUB_TIMEOUT_S, endpoint=self.endpoint)
                answer = ""
            except Exception as error:
                answer = self._refusal(error)

        # looking a host's address up obeys no timeout, so it is waited for from outside
        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        asking.join(2 * _HUB_TIMEOUT_S)
        return answer

    def _refusal(self, error: Exception) -> str:
        why, setting = type(error).__name__, f"`{self.setting}.model`"
        if why == "GatedRepoError":
            return (
                f"{self.model} is gated: accept its terms on the hub and set HF_TOKEN, or name a "
                f"local folder or an open model in {setting}"
            )
        if why in {"RepositoryNotFoundError", "HFValidationError"}:
            return (
                f"{self.model} is no local folder and no model that the hub shows us ({why}): "
                f"check the name, set HF_TOKEN if it is private, or name another in {setting}"
            )
        if why == "RevisionNotFoundError":
            return (
                f"{self.model} has no revision {self.revision}: set `{self.setting}.revision`, or "
                f"name another model in {setting}"
            )
        if why in {"EntryNotFoundError", "RemoteEntryNotFoundError"}:
            return f"{self.model} has no config.json on the hub: name another model in {setting}"
        return (
            f"{self.model} is neither a local folder nor in the hub's cache, and the hub cannot "
            f"be reached ({why}): check the network, or name a local folder in {setting}"
        )


def _lacking(folder: Path) -> str:
    """Return what a folder lacks to be a language model's, or ""."""
    for names in (("config.json",), _TOKENIZERS, (_WEIGHTS, _INDEX)):
        if not any((folder / name).is_file() for name in names):
            return names[0]
    return next((name for name in _weight_files(folder) if not (folder / name).is_file()), "")


def _weight_files(folder: Path) -> list[str]:
    if not (folder / _INDEX).is_file():
        return [_WEIGHTS]
    try:
        return sorted(set(json.loads((folder / _INDEX).read_text())["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise TrainingError(
            f"{folder / _INDEX} does not say where the weights are ({type(error).__name__}): "
            "fetch the model again"
        ) from error


def _folder_sha256(folder: Path) -> str:
    """Return a digest of the weights, the configuration and the tokenizer in a folder."""
    digest = hashlib.sha256()
    others = ("config.json", "tokenizer_config.json", "merges.txt", *_TOKENIZERS)
    for name in sorted({*others, *_weight_files(folder)}):
        if (folder / name).is_file():
            digest.update(f"{name} {file_sha256(folder / name)}\n".encode())
    return digest.hexdigest()
