from tests.support.storages import address, proxy, s3_address, s3_server  # noqa: F401
