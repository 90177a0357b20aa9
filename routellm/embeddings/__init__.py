"""Prompts to vectors: one small protocol, two encoders, one cache on disk."""

from routellm.embeddings.base import Encoder, Progress

__all__ = ["Encoder", "Progress"]
