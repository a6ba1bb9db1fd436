"""A real server of S3 on loopback, a bucket, and a block cache: fixtures for whoever reads URLs."""

import dataclasses
import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from activation_cache import configure_block_cache

# What s3fs, aiohttp and moto leave open or use past its time is not ours to mend.
LET_BE = [
    pytest.mark.filterwarnings("ignore:.*:ResourceWarning:(aiohttp|aiobotocore|asyncio|moto)"),
    pytest.mark.filterwarnings("ignore:.*:DeprecationWarning:(moto|botocore|aiobotocore|s3fs)"),
]
KEY, SECRET = "AKIAEXAMPLEKEY", "an-example-secret-of-some-length"


@dataclasses.dataclass
class Server:
    """A server of S3: what it is asked, and how often it fails first.

    asked: method and path of every request. failing: words in a request that is answered with
    status 500, and how often.
    """

    url: str
    client: Any
    asked: list[str] = dataclasses.field(default_factory=list)
    failing: tuple[str, int] = ("", 0)

    def wrapped(self, app: Callable[..., Iterable[bytes]]) -> Callable[..., Iterable[bytes]]:
        def answer(environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
            request = f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']}"
            self.asked.append(request)
            words, n = self.failing
            if n and words in request:
                self.failing = (words, n - 1)
                start("500 Internal Server Error", [("Content-Length", "0")])
                return []
            return app(environ, start)

        return answer

    def objects(self, bucket: str) -> dict[str, bytes]:
        """Everything in a bucket."""
        found = self.client.list_objects_v2(Bucket=bucket).get("Contents", [])
        keys = [each["Key"] for each in found]
        return {k: self.client.get_object(Bucket=bucket, Key=k)["Body"].read() for k in keys}


@pytest.fixture(scope="module")
def _server() -> Iterator[Server]:
    import boto3
    from botocore.config import Config
    from moto.moto_server.threaded_moto_server import ThreadedMotoServer

    with pytest.MonkeyPatch.context() as patch:
        moto = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
        moto.start()
        host, port = moto.get_host_and_port()
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        patch.setenv("AWS_CONFIG_FILE", os.devnull)
        patch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
        url = f"http://{host}:{port}"
        client = boto3.client(
            "s3",
            endpoint_url=url,
            region_name="us-east-1",
            aws_access_key_id=KEY,
            aws_secret_access_key=SECRET,
            config=Config(retries={"total_max_attempts": 1}),
        )
        server = Server(url, client)
        assert moto._server is not None
        moto._server.app = server.wrapped(moto._server.app)
        yield server
        client.close()
        moto.stop()


@pytest.fixture
def server(_server: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    """The server, found through the environment as users' are, with working credentials."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", _server.url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    _server.asked.clear()
    return _server


_numbers = itertools.count()


@pytest.fixture
def bucket(server: Server) -> str:
    """A new bucket."""
    name = f"bucket-{next(_numbers)}"
    server.client.create_bucket(Bucket=name)
    return name


@pytest.fixture
def blocks(tmp_path: Path) -> Iterator[Path]:
    """A block cache of its own for each test; nothing stays in memory://."""
    configure_block_cache(tmp_path / "blocks")
    yield tmp_path / "blocks"
    configure_block_cache()
    fsspec.filesystem("memory").store.clear()
    fsspec.filesystem("memory").pseudo_dirs[:] = [""]
