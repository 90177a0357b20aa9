"""Data outside the home folder, for several machines: on S3, or in a folder that they all mount.

``storage = "s3://bucket/prefix"`` or ``"file:///mnt/shared"``. Nothing but `Blobs` is asked of it:
objects are put whole, named once, listed by name. docs/storage.md says what lives where.
"""

from __future__ import annotations

from routellm.storage.address import open_storage
from routellm.storage.blobs import Blob, Blobs, FolderBlobs, fetch_verified
from routellm.storage.checkpoints import SharedCheckpoint
from routellm.storage.folders import (
    SharedFolder,
    fetch_folder,
    remove_folder,
    remove_left_over,
    share_folder,
    shared_about,
    shared_folders,
)

__all__ = [
    "Blob",
    "Blobs",
    "FolderBlobs",
    "SharedCheckpoint",
    "SharedFolder",
    "fetch_folder",
    "fetch_verified",
    "open_storage",
    "remove_folder",
    "remove_left_over",
    "share_folder",
    "shared_about",
    "shared_folders",
]
