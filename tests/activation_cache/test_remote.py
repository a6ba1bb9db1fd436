"""Caches at URLs, against a real S3 server on loopback and fsspec's file system in memory."""

import asyncio
import errno
import itertools
import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import s3fs
import torch
from moto.core.authorization import enable_iam_authentication

from activation_cache import (
    ActivationCache,
    CacheBusy,
    CacheCorrupt,
    CacheError,
    DiskFull,
    HarvestProgress,
    LanguageModel,
    block_cache,
    configure_block_cache,
    harvest,
    lease,
    remote_files,
)
from activation_cache.block_cache import BlockCache
from activation_cache.remote import RemoteStore
from activation_cache.store import ByteRange, LocalStore, Store, open_store
from tests.s3_server import KEY, LET_BE, SECRET, Server

pytestmark = [pytest.mark.usefixtures("blocks"), *LET_BE]

HOOKPOINT = "layers.1.resid_post"
MEMORY = "memory://caches/acts"
SMALL: dict[str, Any] = {
    "hookpoints": HOOKPOINT,
    "n_tokens": 100_000,
    "ctx_len": 16,
    "batch_blocks": 4,
    "shard_bytes": 65_536,
    "storage_dtype": "float32",
}


@pytest.fixture(scope="module")
def local(
    tiny_lm: LanguageModel, tiny_corpus: list[str], tmp_path_factory: pytest.TempPathFactory
) -> ActivationCache:
    """A cache in a folder, harvested on one thread as the others here are. Leave it as it is."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    cache = harvest(tiny_lm, tiny_corpus, out=tmp_path_factory.mktemp("local") / "acts", **SMALL)
    torch.set_num_threads(n_threads)
    return cache


@pytest.fixture
def in_s3(server: Server, bucket: str, local: ActivationCache) -> str:
    """A copy of `local` in a bucket."""
    for path in _files(local):
        name = path.relative_to(local.path)
        server.client.put_object(Bucket=bucket, Key=f"acts/{name}", Body=path.read_bytes())
    server.asked.clear()
    return f"s3://{bucket}/acts"


@pytest.fixture
def in_memory(local: ActivationCache) -> str:
    """A copy of `local` in memory://."""
    for path in _files(local):
        name = path.relative_to(local.path)
        fsspec.filesystem("memory").pipe(f"{MEMORY}/{name}", path.read_bytes())
    return MEMORY


def _files(local: ActivationCache) -> list[Path]:
    return [path for path in Path(local.path).rglob("*.*[a-z]") if path.name != ".lock"]


def _told(call: Callable[[], object], kind: type[Exception] = CacheError) -> str:
    """What an error says: one line without a secret."""
    with pytest.raises(kind) as raised:
        call()
    message = str(raised.value)
    assert "\n" not in message
    assert SECRET not in message
    assert KEY not in message
    return message


def _shards(cache: ActivationCache) -> dict[str, bytes]:
    store = open_store(cache.path)
    return {name: store.read(f"shards/{name}") for name in store.names("shards") if name != ".lock"}


def _rows(cache: ActivationCache, **options: Any) -> torch.Tensor:
    return torch.cat(list(cache.batches(HOOKPOINT, 100, **options)))


class _StopError(Exception):
    pass


def _stop_at(n_reports: int) -> Callable[[HarvestProgress], None]:
    reports = itertools.count(1)

    def on_progress(_: HarvestProgress) -> None:
        if next(reports) == n_reports:
            raise _StopError

    return on_progress


# -- a cache at a URL is as one in a folder ------------------------------------------------------


def test_harvest_to_s3_equals_a_local_one(
    server: Server,
    bucket: str,
    tiny_lm: LanguageModel,
    tiny_corpus: list[str],
    local: ActivationCache,
) -> None:
    url = f"s3://{bucket}/acts"
    cache = harvest(tiny_lm, tiny_corpus, out=url, **SMALL)
    assert cache.path == url
    assert cache.n_shards > 2
    assert _shards(cache) == _shards(local)
    assert cache.fingerprint_hash == local.fingerprint_hash
    assert cache.verify() == local.verify()
    assert sorted(open_store(url).names()) == ["manifest.copy.json", "manifest.json", "shards"]
    for split in ("train", "heldout"):
        assert torch.equal(_rows(cache, split=split), _rows(local, split=split))
    assert list(cache.documents()) == list(local.documents())


@pytest.mark.parametrize("window_bytes", [1, 256_000_000])
def test_batches_equal_those_of_a_local_cache(
    in_memory: str, local: ActivationCache, window_bytes: int
) -> None:
    options: dict[str, Any] = {"window_bytes": window_bytes, "heldout_fraction": 0.2}
    cache = ActivationCache.open(in_memory, **options)
    in_folder = ActivationCache.open(local.path, **options)
    for start in (0, 7):
        expected = in_folder.batches(HOOKPOINT, 64, seed=3, start_batch=start, epochs=2)
        for batch in cache.batches(HOOKPOINT, 64, seed=3, start_batch=start, epochs=2):
            assert torch.equal(batch, next(expected))


def test_interrupted_harvest_goes_on(
    server: Server,
    bucket: str,
    tiny_lm: LanguageModel,
    tiny_corpus: list[str],
    local: ActivationCache,
    blocks: Path,
) -> None:
    url = f"s3://{bucket}/some/where/acts"
    for n_reports in (11, 9):
        with pytest.raises(_StopError):
            harvest(tiny_lm, tiny_corpus, out=url, on_progress=_stop_at(n_reports), **SMALL)
        store = open_store(url)
        assert ".lock" not in store.names()
        committed = {name[:6] for name in store.names("shards") if name.endswith(".json")}
        assert {name[:6] for name in store.names("shards")} == committed != set()
        assert list((blocks / ".outgoing").iterdir()) == []
        server.client.put_object(Bucket=bucket, Key="some/where/acts/shards/000900.x", Body=b"left")
    cache = harvest(tiny_lm, tiny_corpus, out=url, **SMALL)
    assert cache.manifest.is_complete
    assert _shards(cache) == _shards(local)


def test_extend_repair_and_int8_work_at_a_url(
    tiny_lm: LanguageModel, tiny_corpus: list[str], tmp_path: Path
) -> None:
    options = SMALL | {"storage_dtype": "int8", "shard_bytes": 16_384}
    places = [MEMORY, str(tmp_path / "acts")]
    for out in places:
        harvest(tiny_lm, tiny_corpus[:20], out=out, **options)
        harvest(tiny_lm, tiny_corpus[20:], out=out, extend=True, **options)
    remote, in_folder = (ActivationCache.open(place) for place in places)
    assert len(remote.parts) == 2
    assert torch.equal(_rows(remote), _rows(in_folder))
    name = f"shards/000001.{HOOKPOINT}.safetensors"
    memory = fsspec.filesystem("memory")
    memory.pipe(f"{MEMORY}/{name}", memory.cat(f"{MEMORY}/{name}")[:-300] + bytes(300))
    memory.rm(f"{MEMORY}/shards/000000.json")
    assert name in _told(remote.verify, CacheCorrupt)
    mended = harvest(tiny_lm, tiny_corpus[:20], out=MEMORY, repair=True, **options)
    assert mended.verify() == in_folder.verify()
    assert _shards(mended) == _shards(in_folder)


def test_file_urls_are_folders(tmp_path: Path) -> None:
    store = open_store(f"file://{tmp_path}/acts")
    assert isinstance(store, LocalStore)
    assert store.folder == tmp_path / "acts"


def test_file_systems_with_folders_show_whole_files_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As sftp, hdfs or webdav, which write files in place."""
    monkeypatch.setattr(lease, "SETTLE_S", 0.01)
    files = remote_files.RemoteFiles(fsspec.filesystem("file"), str(tmp_path / "a" / "b"), "x://b")
    store = RemoteStore(files)
    with store.begin():
        store.write("shards/1.json", b"{}")
        _torn(store, "shards/2.json")
    assert store.names() == ["shards"]
    assert store.names("shards") == ["1.json"]


def _torn(store: Store, name: str) -> None:
    """Begin to write a file, and stop."""
    context = store.written(name, reserve_bytes=100)
    context.__enter__().write(b"half")
    assert not context.__exit__(_StopError, _StopError(), None)


# -- blocks on this machine ----------------------------------------------------------------------


def _data_requests(server: Server) -> list[str]:
    return [each for each in server.asked if each.endswith(".safetensors")]


def test_a_range_is_asked_for_once(server: Server, in_s3: str) -> None:
    first = _rows(ActivationCache.open(in_s3))
    assert len(_data_requests(server)) > 6
    server.asked.clear()
    assert torch.equal(_rows(ActivationCache.open(in_s3)), first)
    assert _data_requests(server) == []
    ActivationCache.open(in_s3).verify()  # reads what is there, not what is here
    assert _data_requests(server)


def _ranges(blocks: Path) -> list[Path]:
    return [path for path in blocks.glob("[!.]*/*") if path.is_file()]


def test_damaged_local_block_is_fetched_again(server: Server, in_s3: str, blocks: Path) -> None:
    first = _rows(ActivationCache.open(in_s3))
    altered, cut, gone = (sorted(_ranges(blocks))[n::3] for n in range(3))
    assert gone
    for path in altered:
        path.write_bytes(bytes(path.stat().st_size))
    for path in cut:
        path.write_bytes(path.read_bytes()[:-1])
    for path in gone:
        path.unlink()
    assert torch.equal(_rows(ActivationCache.open(in_s3)), first)
    server.asked.clear()
    assert torch.equal(_rows(ActivationCache.open(in_s3)), first)  # and replaced
    assert _data_requests(server) == []


def test_damaged_object_is_named(in_memory: str) -> None:
    memory = fsspec.filesystem("memory")
    path = f"/caches/acts/shards/000001.{HOOKPOINT}.safetensors"
    data = bytearray(memory.cat(path))
    data[2_000] ^= 1
    memory.pipe(path, bytes(data))
    cache = ActivationCache.open(in_memory)
    message = _told(lambda: _rows(cache), CacheCorrupt)
    assert message.startswith(f"memory:/{path} is damaged: block 0 does not match its checksum")
    memory.pipe(path, bytes(data[:-1]))
    assert "bytes, not" in _told(ActivationCache.open(in_memory).verify, CacheCorrupt)
    memory.rm(path)
    assert "it is missing" in _told(ActivationCache.open(in_memory).verify, CacheCorrupt)


def test_replaced_object_is_read_anew(server: Server, bucket: str) -> None:
    place, out = ByteRange("shards/x", 1, 4), bytearray(3)
    for content in (b"12345", b"abcde"):
        server.client.put_object(Bucket=bucket, Key="acts/shards/x", Body=content)
        assert open_store(f"s3://{bucket}/acts").read_into(place, memoryview(out))
        assert bytes(out) == content[1:4]
    assert not open_store(f"s3://{bucket}/acts").read_into(ByteRange("shards/x", 3, 6), out)
    assert not open_store(f"s3://{bucket}/acts").read_into(ByteRange("shards/y", 3, 6), out)


def test_least_recently_used_blocks_go_first(blocks: Path) -> None:
    cache = BlockCache(blocks, 10_000)
    for n in range(30):
        cache.put("key" + str(n % 3), n * 900, bytes([n]) * 900)
        time.sleep(0.001)
        assert cache.has("key0", 0, 900)  # touched each time
        assert sum(path.stat().st_size for path in _ranges(blocks)) <= 10_000
    assert {path.name for path in _ranges(blocks)} >= {"0-900", "26100-27000"}
    out = bytearray(900)
    assert cache.read_into("key2", 26_100, 27_000, memoryview(out))
    assert bytes(out) == bytes([29]) * 900
    assert not cache.read_into("key1", 900, 1_800, memoryview(out))
    cache.put("key", 0, bytes(10_001))
    assert not cache.has("key", 0, 10_001)


def test_a_window_larger_than_the_block_cache_is_read_all_the_same(
    in_memory: str, blocks: Path, local: ActivationCache
) -> None:
    for max_bytes in (0, 5_000):
        configure_block_cache(blocks, max_bytes)
        assert torch.equal(_rows(ActivationCache.open(in_memory)), _rows(local))
        assert sum(path.stat().st_size for path in _ranges(blocks)) <= max_bytes


def test_many_may_share_a_folder(blocks: Path) -> None:
    """Two block caches, as of two processes, in eight threads."""
    caches = [BlockCache(blocks, 50_000) for _ in range(2)]
    wrong: list[int] = []

    def work(seed: int) -> None:
        rng, out = np.random.default_rng(seed), bytearray(1_000)
        for n in rng.integers(0, 100, 200).tolist():
            cache = caches[seed % 2]
            if cache.read_into(f"k{n}", 0, 1_000, memoryview(out)):
                wrong.extend([n] if bytes(out) != bytes([n]) * 1_000 else [])
            else:
                cache.put(f"k{n}", 0, bytes([n]) * 1_000)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert 0 < sum(path.stat().st_size for path in _ranges(blocks)) <= 60_000


def test_unwritable_block_cache_is_no_obstacle_to_reading(
    in_memory: str, local: ActivationCache, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    configure_block_cache(tmp_path / "file" / "blocks")
    assert torch.equal(_rows(ActivationCache.open(in_memory)), _rows(local))
    assert caplog.text.count("can't keep blocks in") == 1
    assert "can't make the folder" in _told(lambda: open_store(MEMORY).write("x", b""))
    with pytest.raises(CacheError, match="max_bytes=-1: expected 0 or more"):
        configure_block_cache(max_bytes=-1)


# -- writing -------------------------------------------------------------------------------------


def test_upload_that_dies_in_the_middle_leaves_nothing(
    server: Server, bucket: str, blocks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_files, "_PART_BYTES", 5 << 20)
    store, data = open_store(f"s3://{bucket}/acts"), bytes(11 << 20)
    call = s3fs.S3FileSystem._call_s3

    async def dying(self: Any, method: str, *arguments: Any, **options: Any) -> Any:
        if method == "upload_part" and options["PartNumber"] == 3:
            await asyncio.sleep(0.2)  # the other parts are there
            raise OSError(errno.EIO, "torn")
        return await call(self, method, *arguments, **options)

    monkeypatch.setattr(s3fs.S3FileSystem, "_call_s3", dying)
    assert "torn" in _told(lambda: store.write("shards/x", data))
    monkeypatch.setattr(s3fs.S3FileSystem, "_call_s3", call)
    _torn(store, "shards/y")
    assert server.objects(bucket) == {}
    assert "Uploads" not in server.client.list_multipart_uploads(Bucket=bucket)
    assert list((blocks / ".outgoing").iterdir()) == []
    store.write("shards/x", data)
    assert store.size("shards/x") == len(data)


def test_files_are_written_at_an_offset_too(blocks: Path) -> None:
    store = open_store(MEMORY)
    with store.written("shards/x", reserve_bytes=1_000) as file:
        file.write(b"....cde")
        file.write(b"ab", at=2)
        assert not store.has("shards/x")
    assert store.read("shards/x") == b"..abcde"
    store.remove("shards/x")
    store.remove("shards/x")
    assert not store.has("shards/x")
    with pytest.raises(FileNotFoundError):
        store.read("shards/x")


def test_full_scratch_disk_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    message = _told(lambda: open_store(MEMORY).written("x", reserve_bytes=9).__enter__(), DiskFull)
    assert message.startswith("disk full: no room for ")
    assert ".outgoing" in message


def test_left_uploads_of_dead_processes_are_swept(blocks: Path) -> None:
    left = blocks / ".outgoing" / "0-x"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"left")
    os.utime(left, (0, 0))
    store = open_store(MEMORY)
    with store.written("y") as file:  # of this process: it stays
        file.write(b"1")
        (alive,) = set(left.parent.iterdir()) - {left}
        os.utime(alive, (0, 0))
        with store.begin():
            assert list(left.parent.iterdir()) == [alive]


# -- two writers ---------------------------------------------------------------------------------


def _lease_of(store: Store, **change: Any) -> bytes:
    """What a lease says, with some of it changed."""
    with store.begin():
        held = json.loads(store.read(".lock"))
    return json.dumps(held | change).encode()


def test_second_writer_is_told_who_writes(
    server: Server, bucket: str, tmp_path: Path, tiny_lm: LanguageModel, tiny_corpus: list[str]
) -> None:
    url, raised = f"s3://{bucket}/acts", list[str]()

    def meanwhile(_: HarvestProgress) -> None:
        if not raised:
            raised.append(_told(lambda: harvest(tiny_lm, tiny_corpus, out=url, **SMALL), CacheBusy))
            configure_block_cache(tmp_path / "another machine")
            raised.append(_told(lambda: harvest(tiny_lm, tiny_corpus, out=url, **SMALL), CacheBusy))

    harvest(tiny_lm, tiny_corpus, out=url, on_progress=meanwhile, **SMALL).verify()
    me = f"process {os.getpid()} on {os.uname().nodename}"
    assert raised[0] == f"{url} is being written by {me}: wait for it, or choose another folder"
    assert raised[1].startswith(f"{url} is being written by {me} (seen ")


def test_of_two_who_begin_at_once_one_wins(server: Server, bucket: str, tmp_path: Path) -> None:
    files = remote_files.RemoteFiles.open(f"s3://{bucket}/acts")
    barrier, outcomes = threading.Barrier(4), list[str]()

    def begin(machine: str) -> None:
        barrier.wait()
        try:
            with lease.Lease(files, machine).held():
                outcomes.append("held")
                time.sleep(0.5)
        except CacheBusy:
            outcomes.append("busy")

    threads = [threading.Thread(target=begin, args=(f"machine {n}",)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["busy", "busy", "busy", "held"]
    assert server.objects(bucket) == {}


def test_lease_that_is_not_renewed_is_taken_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "SETTLE_S", 0.01)
    store = open_store(MEMORY)
    foreign = {"host": "gpu-7", "pid": 12, "machine": "other", "token": "theirs"}
    store.write(".lock", _lease_of(store, **foreign, renewed_at=time.time() - 200))
    assert "is being written by process 12 on gpu-7 (seen 200 s ago" in _told(
        store.begin().__enter__, CacheBusy
    )
    store.write(".lock", _lease_of(open_store("memory://else"), **foreign, renewed_at=1.0))
    with store.begin():
        assert json.loads(store.read(".lock"))["pid"] == os.getpid()
    assert not store.has(".lock")
    mine = _lease_of(store, pid=1, token="killed")  # of this machine, and nobody holds its lock
    store.write(".lock", mine)
    with store.begin():
        pass
    store.write(".lock", b"{")
    assert "see that nobody writes there" in _told(store.begin().__enter__, CacheBusy).lower()


def test_writer_that_lost_its_lease_commits_nothing() -> None:
    store = open_store(MEMORY)
    other = _lease_of(store, token="theirs")
    with store.begin():
        store.write("a.json", b"{}")
        open_store(MEMORY).write(".lock", other)
        _told(lambda: store.write("b.json", b"{}"), CacheBusy)
    assert store.names() == [".lock", "a.json"]  # the lease is theirs to release


def test_lease_is_renewed_while_it_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "RENEW_S", 0.02)
    store = open_store(MEMORY)
    with store.begin():
        first = json.loads(store.read(".lock"))
        deadline = time.monotonic() + 10
        while json.loads(store.read(".lock"))["renewed_at"] <= first["renewed_at"]:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert json.loads(store.read(".lock"))["token"] == first["token"]


# -- what goes wrong on the way ------------------------------------------------------------------


def test_mistakes_are_told_in_a_line_before_a_model_is_loaded(
    server: Server, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened(url: str) -> str:
        def load() -> LanguageModel:
            raise AssertionError("a model was loaded")

        s3fs.S3FileSystem.clear_instance_cache()
        return _told(lambda: harvest(load, ["a"], out=url, hookpoints=HOOKPOINT))

    url = f"s3://{bucket}/acts"
    assert opened("s3://no-such-bucket/acts") == (
        "s3://no-such-bucket/acts: there is no bucket no-such-bucket: make it first, or check its "
        "name and whose it is"
    )
    assert "can't be used: Parameter validation failed: Invalid bucket name" in opened("s3://B!/a")
    assert "unknown protocol 's4'" in opened("s4://bucket/acts")
    assert opened(f"s3://me:{SECRET}@bucket/acts").startswith("s3://bucket/acts can't be used")
    server.client.put_object(Bucket=bucket, Key="file", Body=b"1")
    assert opened(f"s3://{bucket}/file") == f"s3://{bucket}/file is a file: choose a folder"
    with enable_iam_authentication():
        assert opened(url) == (
            f"access to {url} was refused (InvalidAccessKeyId): check the credentials, and what "
            "they may do there"
        )
    with monkeypatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
        patch.setenv("AWS_MAX_ATTEMPTS", "1")
        assert opened(url).startswith(f"{url} can't be reached: Could not connect to the endpoint")
    with monkeypatch.context() as patch:
        patch.delenv("AWS_ACCESS_KEY_ID")
        patch.delenv("AWS_SECRET_ACCESS_KEY")
        assert opened(url) == (
            f"no credentials for {url}: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or run "
            "aws configure"
        )


@pytest.mark.parametrize(
    ("url", "package", "extra"), [("s3://b/a", "s3fs", "s3"), ("gs://b/a", "gcsfs", "gcs")]
)
def test_missing_package_is_named(
    url: str, package: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*_: Any, **__: Any) -> None:
        raise ImportError(f"Install {package} to access it")

    monkeypatch.setattr(remote_files, "url_to_fs", missing)
    assert _told(lambda: open_store(url)) == (
        f"{url} needs {package}: pip install 'saebase[{extra}]'"
    )


def test_faults_that_pass_are_not_noticed(
    server: Server, in_s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_files, "_FIRST_WAIT_S", 0.01)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")  # by botocore itself, which waits for seconds
    first = _rows(ActivationCache.open(in_s3))
    configure_block_cache(max_bytes=0)
    server.failing = (".safetensors", 2)
    assert torch.equal(_rows(ActivationCache.open(in_s3)), first)
    assert server.failing[1] == 0


@pytest.mark.parametrize(
    "error", [TimeoutError("slow"), ConnectionResetError("reset"), OSError(errno.ENOSYS, "no")]
)
def test_only_what_may_pass_is_tried_again(error: OSError, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_files, "_FIRST_WAIT_S", 0.001)
    store, memory = open_store(MEMORY), fsspec.filesystem("memory")
    store.write("x", b"1")
    for n_faults, passes in ((5, True), (6, False)):
        cat, n_calls = type(memory).cat_file, itertools.count(1)

        def failing(*arguments: Any, n: int = n_faults, **options: Any) -> bytes:
            if next(n_calls) <= n:  # noqa: B023
                raise error
            return cat(*arguments, **options)  # noqa: B023

        with monkeypatch.context() as patch:
            patch.setattr(type(memory), "cat_file", failing)
            if error.errno == errno.ENOSYS:
                assert _told(lambda: store.read("x")) == f"{MEMORY} can't be used: {error}"
                assert next(n_calls) == 2
            elif passes:
                assert store.read("x") == b"1"
            else:
                assert _told(lambda: store.read("x")).startswith(
                    f"{MEMORY} can't be reached: {error}. What was committed is safe: "
                )


def test_secrets_are_left_out_of_messages() -> None:
    said = remote_files._without_secrets(
        f"GET https://me:{SECRET}@host/x?X-Amz-Signature={SECRET}&X-Amz-Credential=a%2Fb&list=1 "
        f"with aws_secret_access_key={SECRET} and {KEY}",
        {"client_kwargs": {"aws_access_key_id": KEY}, "anon": False},
    )
    assert SECRET not in said
    assert KEY not in said
    assert "list=1" in said


def test_the_default_block_cache_lies_beside_the_models() -> None:
    configure_block_cache()
    current = block_cache.block_cache()
    assert current.folder.parts[-2:] == ("saebase", "blocks")
    assert current.max_bytes == 20_000_000_000
