"""What machines share, as the tests of it have it: in a folder, and on moto's S3 server.

Fixtures: a folder of tests takes them into its ``conftest.py``.
"""

import uuid
from contextlib import ExitStack

import pytest

from tests.support.s3_proxy import s3_proxy
from tests.support.servers import moto_s3


@pytest.fixture(scope="session")
def s3_server():
    """moto's S3 server behind a proxy; it lists five objects at once, so lists have pages."""
    pytest.importorskip("moto")
    with ExitStack() as running:
        with pytest.MonkeyPatch.context() as patch:  # no server that is started later shall
            patch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", "5")
            bucket = running.enter_context(moto_s3())
        yield bucket, running.enter_context(s3_proxy(bucket.endpoint))


@pytest.fixture
def s3_address(s3_server, monkeypatch):
    from routellm.storage import s3

    bucket, proxy = s3_server
    for name, value in bucket.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.url)
    monkeypatch.setattr(s3, "_FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(s3, "PATIENCE_S", 30.0)
    s3._client.cache_clear()
    yield f"s3://{bucket.name}/{uuid.uuid4().hex}"
    proxy.refuse.clear()
    proxy.away, proxy.lose_answers, proxy.break_off = None, 0, 0


@pytest.fixture
def proxy(s3_server):
    return s3_server[1]


@pytest.fixture(params=["file", pytest.param("s3", marks=pytest.mark.slow)])
def address(request, tmp_path):
    if request.param == "s3":
        return request.getfixturevalue("s3_address")
    return f"file://{tmp_path}/storage"
