"""Encoder behind an OpenAI-compatible ``/embeddings`` endpoint."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from routellm.embeddings.base import Progress
from routellm.errors import EmbeddingError, UsageError
from routellm.settings import EmbeddingSettings

_ATTEMPTS = 5
_RETRIED = frozenset({408, 409, 429, 500, 502, 503, 504})


class OpenAIEncoder:
    """Asks an endpoint for embeddings, in batches, retrying what may pass.

    Raises
    ------
    UsageError
        If no `base_url` is set.
    """

    def __init__(self, settings: EmbeddingSettings, *, backoff_s: float = 0.5) -> None:
        if not settings.base_url:
            raise UsageError("set `embedding.base_url` to use an OpenAI-compatible endpoint")
        self._settings = settings
        self._url = settings.base_url.rstrip("/") + "/embeddings"
        self._backoff_s = backoff_s
        self._dimensions = settings.dimensions

    @property
    def identity(self) -> str:
        size = self._settings.dimensions or "full"
        return f"{self._settings.base_url}/{self._settings.model}@{size}"

    @property
    def dimensions(self) -> int:
        if self._dimensions is None:
            self._dimensions = self.encode(["dimensions"]).shape[1]
        return self._dimensions

    def encode(
        self, prompts: Sequence[str], *, progress: Progress | None = None
    ) -> NDArray[np.float32]:
        import httpx

        headers = {}
        if self._settings.api_key:
            headers["Authorization"] = f"Bearer {self._settings.api_key.get_secret_value()}"
        rows: list[NDArray[np.float32]] = []
        with httpx.Client(timeout=self._settings.timeout_s, headers=headers) as client:
            for start in range(0, len(prompts), self._settings.batch_size):
                batch = list(prompts[start : start + self._settings.batch_size])
                rows.append(self._ask(client, batch))
                if progress:
                    progress(min(start + len(batch), len(prompts)), len(prompts))
        if not rows:
            return np.empty((0, self.dimensions), dtype=np.float32)
        out = np.concatenate(rows)
        unit: NDArray[np.float32] = out / np.maximum(
            np.linalg.norm(out, axis=1, keepdims=True), np.float32(1e-12)
        )
        return unit

    def _ask(self, client: Any, batch: list[str]) -> NDArray[np.float32]:
        import httpx

        body: dict[str, Any] = {"model": self._settings.model, "input": batch}
        if self._settings.dimensions:
            body["dimensions"] = self._settings.dimensions
        problem = ""
        for attempt in range(_ATTEMPTS):
            if attempt:
                time.sleep(self._backoff_s * 2 ** (attempt - 1))
            try:
                answer = client.post(self._url, json=body)
            except httpx.HTTPError as error:
                problem = type(error).__name__
                continue
            if answer.status_code in _RETRIED:
                problem = f"status {answer.status_code}"
                continue
            if answer.status_code != 200:
                problem = f"status {answer.status_code}"
                break
            return self._read(answer, len(batch))
        raise EmbeddingError(
            f"the embeddings endpoint {self._url} gave {problem}: check `embedding.base_url`, "
            "`embedding.model` and `embedding.api_key`"
        )

    def _read(self, answer: Any, n: int) -> NDArray[np.float32]:
        try:
            data = sorted(answer.json()["data"], key=lambda item: item["index"])
            out = np.array([item["embedding"] for item in data], dtype=np.float32)
        except (ValueError, KeyError, TypeError) as error:
            raise EmbeddingError(
                f"the embeddings endpoint {self._url} answered with something that is not an "
                "embeddings list: check that it speaks OpenAI's protocol"
            ) from error
        want = self._settings.dimensions
        if out.ndim != 2 or len(out) != n or (want and out.shape[1] != want):
            raise EmbeddingError(
                f"the embeddings endpoint {self._url} gave an array of shape {out.shape} for {n} "
                f"prompts (dimensions wanted: {want or 'any'}): set `embedding.dimensions` to match"
            )
        if not np.isfinite(out).all():
            raise EmbeddingError(f"the embeddings endpoint {self._url} gave values not finite")
        return out
