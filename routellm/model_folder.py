"""A model as a folder: weights in safetensors, all else in JSON, each file's digest beside it."""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from routellm.errors import BundleError
from routellm.snapshots import file_sha256, write_atomic

_WEIGHTS, _DIGESTS = "weights.safetensors", "digests.json"


def write_model(
    directory: Path, arrays: Mapping[str, NDArray[Any]], document: Mapping[str, Any], name: str
) -> None:
    """Write a model so that `directory` holds all of it or does not exist.

    An existing one there is replaced.

    Parameters
    ----------
    name : str
        File name of the document.
    """
    from safetensors.numpy import save_file

    temporary = directory.with_name(f".{directory.name}.{uuid.uuid4().hex}")
    temporary.mkdir(parents=True)
    try:
        save_file({k: np.ascontiguousarray(v) for k, v in arrays.items()}, temporary / _WEIGHTS)
        write_atomic(temporary / name, json.dumps(document, indent=1, sort_keys=True))
        sums = {one: file_sha256(temporary / one) for one in (_WEIGHTS, name)}
        write_atomic(temporary / _DIGESTS, json.dumps(sums, indent=1))
        if directory.exists():
            old = directory.with_name(f".{directory.name}.{uuid.uuid4().hex}.old")
            directory.rename(old)
            temporary.rename(directory)
            shutil.rmtree(old)
        else:
            temporary.rename(directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read_model(
    directory: Path, name: str, *, again: str
) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """Return the arrays and the document of a model, each file checked against its digest.

    Parameters
    ----------
    again : str
        What to do where a file is damaged, for the message.

    Raises
    ------
    BundleError
        If a file is not what was written.
    OSError, ValueError, KeyError
        If a file is missing or is none of ours.
    """
    from safetensors.numpy import load_file

    sums = json.loads((directory / _DIGESTS).read_text())
    for one in (_WEIGHTS, name):
        if file_sha256(directory / one) != sums[one]:
            raise BundleError(
                f"{directory / one} is not what was saved (SHA-256 differs): the copy is damaged; "
                f"{again}"
            )
    return load_file(directory / _WEIGHTS), json.loads((directory / name).read_text())
