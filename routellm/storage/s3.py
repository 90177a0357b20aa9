"""Objects on S3, or on what speaks its protocol (MinIO, Ceph): boto3, and patience.

boto3 and not fsspec's s3fs: that one stands on aiobotocore, which pins a botocore of its own, below
the one that MLflow's boto3 needs; and what matters here, the conditional write, is one parameter
of one call. Credentials, region and endpoint are found by boto3 (``AWS_*``, ``~/.aws``, the
machine's role); no message holds any.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterable
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar

from routellm.errors import StorageError, StorageUnreachable, UsageError
from routellm.storage.blobs import Blob

PATIENCE_S = 60.0  # of trying again what may pass
_FIRST_WAIT_S = 0.2  # doubles
_LONGEST_WAIT_S = 10.0
_MAY_PASS = (408, 409, 425, 429)  # and from 500 on; 409: two conditional writes met
_MAY_PASS_CODES = ("RequestTimeout", "SlowDown", "Throttling", "ThrottlingException")
_CREDENTIALS = (
    "AccessDenied", "AllAccessDisabled", "AuthorizationHeaderMalformed", "ExpiredToken",
    "InvalidAccessKeyId", "InvalidToken", "SignatureDoesNotMatch", "Forbidden",
)  # fmt: skip

T = TypeVar("T")


class S3Blobs:
    """Objects of one bucket, below a prefix.

    It relies on what S3 says of itself: an object that was put is listed and read by whoever asks
    afterwards; it is seen whole or not at all; and of several that put one name with
    ``If-None-Match: *``, one succeeds.

    Parameters
    ----------
    patience_s : float
        For how long a call is tried again that failed as one that may pass.
    """

    def __init__(self, bucket: str, prefix: str, *, patience_s: float | None = None) -> None:
        self.bucket = bucket
        self.prefix = prefix
        self.patience_s = PATIENCE_S if patience_s is None else patience_s

    @property
    def address(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}"

    def put(self, name: str, data: bytes | Path) -> None:
        self._ask("write", lambda s3: self._put(s3, name, data))

    def put_new(self, name: str, data: bytes) -> bool:
        def put(s3: Any) -> bool:
            from botocore.exceptions import ClientError

            try:
                self._put(s3, name, data, IfNoneMatch="*")
                return True
            except ClientError as error:
                if _status(error) != 412:
                    raise
                return False

        # an answer can be lost after the write was done: then the second try finds our own object
        return self._ask("write", put) or self.get(name) == data

    def get(self, name: str) -> bytes | None:
        def get(s3: Any) -> bytes:
            body: bytes = s3.get_object(Bucket=self.bucket, Key=self._key(name))["Body"].read()
            return body

        return self._ask("read", lambda s3: _unless_missing(get, s3))

    def fetch(self, name: str, path: Path) -> bool:
        def fetch(s3: Any) -> bool:
            body = s3.get_object(Bucket=self.bucket, Key=self._key(name))["Body"]
            with path.open("wb") as file:
                for chunk in body.iter_chunks(1 << 20):
                    file.write(chunk)
            return True

        return self._ask("read", lambda s3: _unless_missing(fetch, s3)) is not None

    def list(self, prefix: str = "", after: str = "") -> list[Blob]:
        found: list[Blob] = []
        page: dict[str, Any] = {"StartAfter": self._key(after)} if after else {}
        skip = len(self._key(""))
        while True:
            how = {"Bucket": self.bucket, "Prefix": self._key(prefix), **page}
            answer = self._ask("list", partial(_call, "list_objects_v2", how))
            found += [
                Blob(one["Key"][skip:], one["Size"], one["LastModified"], one["ETag"])
                for one in answer.get("Contents", ())
            ]
            if not answer.get("IsTruncated"):
                return found
            page = {"ContinuationToken": answer["NextContinuationToken"]}

    def delete(self, names: Iterable[str]) -> None:
        for name in names:
            how = {"Bucket": self.bucket, "Key": self._key(name)}
            self._ask("remove from", partial(_call, "delete_object", how))

    def _key(self, name: str) -> str:
        return f"{self.prefix}/{name}" if self.prefix else name

    def _put(self, s3: Any, name: str, data: bytes | Path, **condition: str) -> None:
        how = {"Bucket": self.bucket, "Key": self._key(name), **condition}
        if isinstance(data, bytes):
            s3.put_object(Body=data, **how)
            return
        with data.open("rb") as file:  # one request, so a kill leaves no half of an upload to pay
            s3.put_object(Body=file, **how)

    def _ask(self, what: str, call: Callable[[Any], T]) -> T:
        """Call, again while it fails as what may pass does, with waits that double."""
        s3 = _client(os.getpid())
        from botocore import exceptions as boto

        end, wait_s = time.monotonic() + self.patience_s, _FIRST_WAIT_S
        while True:
            try:
                return call(s3)
            except boto.ClientError as error:
                code, status = str(error.response.get("Error", {}).get("Code")), _status(error)
                if not (status >= 500 or status in _MAY_PASS or code in _MAY_PASS_CODES):
                    raise self._refused(what, code, status) from None
                why = f"it answers {status}"
            except boto.SSLError:
                raise StorageError(
                    f"the certificate of S3's endpoint is not trusted, so {self.address} was not "
                    "asked: set AWS_CA_BUNDLE to the authority that signed it"
                ) from None
            except (boto.HTTPClientError, boto.ConnectionError, boto.IncompleteReadError) as error:
                why = f"{type(error).__name__}"
            except boto.BotoCoreError as error:
                raise self._refused(what, type(error).__name__, 403) from None
            if time.monotonic() + wait_s > end:
                raise StorageUnreachable(
                    f"S3 did not let us {what} {self.address} within {self.patience_s:.0f} s "
                    f"({why}): nothing is half-done; run again when it is back"
                )
            time.sleep(wait_s * random.uniform(0.5, 1.0))
            wait_s = min(2 * wait_s, _LONGEST_WAIT_S)

    def _refused(self, what: str, code: str, status: int) -> StorageError:
        if code == "NoSuchBucket":
            return StorageError(
                f"there is no bucket {self.bucket!r}: make it, or set `storage` to another; "
                "AWS_ENDPOINT_URL_S3 says where, if it is not at Amazon"
            )
        if status in (401, 403) or code in _CREDENTIALS:
            return StorageError(
                f"S3 does not let us {what} {self.address} ({code}): check the credentials "
                "(AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or ~/.aws) and the bucket's policy"
            )
        return StorageError(
            f"S3 refuses to {what} {self.address} (status {status}, {code}): check `storage`, "
            "AWS_REGION and AWS_ENDPOINT_URL_S3"
        )


def _call(method: str, how: dict[str, Any], s3: Any) -> Any:
    return getattr(s3, method)(**how)


def _status(error: Any) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _unless_missing(call: Callable[[Any], T], s3: Any) -> T | None:
    try:
        return call(s3)
    except s3.exceptions.NoSuchKey:
        return None


@cache
def _client(process: int) -> Any:
    """Return this process's client: connections do not live through a fork."""
    try:
        import boto3
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError
    except ImportError as error:
        raise UsageError("`storage` on S3 needs boto3: pip install 'routellm-mlops[s3]'") from error
    # tried once: `_ask` tries again, also what breaks off inside an answer, for a bounded time
    how = Config(connect_timeout=5, read_timeout=30, retries={"total_max_attempts": 1})
    try:
        return boto3.session.Session().client("s3", config=how)
    except (BotoCoreError, ValueError) as error:
        raise StorageError(
            f"S3 cannot be asked as it is set up ({type(error).__name__}): check the AWS_* "
            "environment variables and ~/.aws"
        ) from error
