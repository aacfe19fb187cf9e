"""Object stores on this machine, moto's S3 server and an emulator of GCS, for tests of addresses."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from features.storage.location import Remote
from tests.servers import free_port

_ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_DEFAULT_REGION": "us-east-1",
}


@contextmanager
def object_store(bucket: str = "shop") -> Iterator[Remote]:
    """Yields the address of a new bucket; this process and its children find the store by their environment."""
    import s3fs
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    before = {name: os.environ.get(name) for name in [*_ENVIRONMENT, "AWS_ENDPOINT_URL"]}
    os.environ.update(_ENVIRONMENT, AWS_ENDPOINT_URL=f"http://{host}:{port}")
    try:
        # The clients of an earlier store know another port.
        s3fs.S3FileSystem.clear_instance_cache()
        s3fs.S3FileSystem().mkdir(bucket)
        yield Remote(f"s3://{bucket}")
    finally:
        s3fs.S3FileSystem.clear_instance_cache()
        server.stop()
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def google_store(bucket: str = "shop") -> Iterator[Remote]:
    """Yields the address of a new bucket at an emulator of Google Cloud Storage."""
    names = {"GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false", "STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{free_port()}"}
    before = {name: os.environ.get(name) for name in names}
    # gcsfs reads the first when it is imported; without it, it asks for the bucket's kind with real credentials.
    os.environ.update(names)
    from gcp_storage_emulator.server import create_server
    from gcsfs import GCSFileSystem

    port = int(names["STORAGE_EMULATOR_HOST"].rpartition(":")[2])
    server = create_server("127.0.0.1", port, in_memory=True, default_bucket=bucket)
    server.start()
    try:
        GCSFileSystem.clear_instance_cache()
        yield Remote(f"gs://{bucket}")
    finally:
        GCSFileSystem.clear_instance_cache()
        server.stop()
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
