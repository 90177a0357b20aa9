"""Count tokens with a real tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from routellm.embeddings.sentence import clean, local_folder
from routellm.errors import UsageError
from routellm.policies.recorded import CountTokens


def counter(name: str) -> CountTokens:
    """Return what counts the tokens of texts, without those that a model adds around them.

    Parameters
    ----------
    name : str
        A tokenizer's name on the Hugging Face hub, or a folder that holds ``tokenizer.json``.

    Raises
    ------
    UsageError
        If it cannot be loaded.
    """
    from tokenizers import Tokenizer

    folder = local_folder(name)
    try:
        tokenizer = (
            Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
            if folder
            else Tokenizer.from_pretrained(name)
        )
    except Exception as error:  # the library raises plain ones
        raise UsageError(
            f"cannot load the tokenizer {name!r} (`policies.tokenizer`): name a folder with "
            "tokenizer.json, or a hub model that can be reached"
        ) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()

    def count(texts: Sequence[str]) -> NDArray[np.int64]:
        found = tokenizer.encode_batch([clean(t) for t in texts], add_special_tokens=False)
        return np.array([len(one) for one in found], dtype=np.int64)

    return count
