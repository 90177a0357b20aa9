"""Where a storage is: the address of a bucket, or of a folder."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

from routellm.errors import UsageError
from routellm.storage.blobs import Blobs, FolderBlobs

_BUCKET = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9._-]{1,253}[a-zA-Z0-9]")


def open_storage(address: str, under: str) -> Blobs:
    """Return the objects below `under` at an address; nothing is asked of it yet.

    Raises
    ------
    UsageError
        If the address is of no kind that is known. It is not repeated: it may hold a key.
    """
    url = urlsplit(address)
    if url.query or url.fragment or "@" in url.netloc:
        raise UsageError(
            "`storage` is an address alone, such as s3://bucket/prefix: credentials and the "
            "endpoint are read from the AWS_* environment variables or from ~/.aws"
        )
    if url.scheme == "s3" and _BUCKET.fullmatch(url.netloc):
        from routellm.storage.s3 import S3Blobs

        return S3Blobs(url.netloc, "/".join(p for p in (*url.path.split("/"), under) if p))
    if url.scheme == "file" and url.netloc in ("", "localhost") and len(url.path) > 1:
        return FolderBlobs(Path(unquote(url.path)) / under)
    raise UsageError(
        f"`storage` is of no kind that is known here ({url.scheme or 'no scheme'}): set it to "
        "s3://bucket/prefix, or to file:///folder for a folder that all machines mount"
    )
