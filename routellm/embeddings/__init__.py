"""Prompts to vectors: one small protocol, two encoders, one cache on disk."""

from __future__ import annotations

from pathlib import Path

from routellm.embeddings.base import Encoder, Progress
from routellm.settings import EmbeddingSettings

__all__ = ["Encoder", "Progress", "get_encoder"]


def get_encoder(
    settings: EmbeddingSettings, cache_path: Path | None = None, storage: str | None = None
) -> Encoder:
    """Return the encoder that settings name, behind the cache at `cache_path` if given.

    With `storage`, an address, what it encodes is had in common with other homes there.
    """
    from routellm.embeddings.cache import CachedEncoder
    from routellm.embeddings.openai import OpenAIEncoder
    from routellm.embeddings.sentence import SentenceTransformerEncoder

    encoder: Encoder
    if settings.provider == "openai":
        encoder = OpenAIEncoder(settings)
    else:
        encoder = SentenceTransformerEncoder(settings)
    return CachedEncoder(encoder, cache_path, storage) if cache_path is not None else encoder
