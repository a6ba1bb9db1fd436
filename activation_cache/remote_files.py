"""Files below one URL, through fsspec: faults told in one line, passing ones tried again.

In: a URL of any file system that fsspec knows. Out: `RemoteFiles`, which is all that the rest of
the package sees of fsspec. File systems raise errors of a hundred kinds (botocore's, aiohttp's,
requests'): each passes `_call`, and leaves it as FileNotFoundError or as a CacheError in which no
secret stands.
"""

import errno
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from fsspec.core import url_to_fs
from fsspec.registry import known_implementations
from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception,
    stop_after_attempt,
    stop_after_delay,
    wait_random_exponential,
)

from .errors import CacheError

log = logging.getLogger(__name__)

S3 = ("s3", "s3a")
GCS = ("gs", "gcs")
_WHOLE = (*S3, *GCS, "hf", "abfs", "az", "oci", "oss", "memory")
"""Protocols of stores in which a file that is written appears whole; there are no folders."""
_BUCKETS = {protocol: 1 for protocol in _WHOLE if protocol not in ("hf", "memory")} | {"hf": 3}
"""How many parts of a path name what must be there before anything can be written."""
_PART_BYTES = 16 << 20
"""Of uploads in several parts: ten are in memory at a time."""
_EXTRAS = dict.fromkeys(S3, ("s3fs", "s3")) | dict.fromkeys(GCS, ("gcsfs", "gcs"))
_LOGIN = {
    **dict.fromkeys(S3, "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or run aws configure"),
    **dict.fromkeys(GCS, "run gcloud auth application-default login"),
    "hf": "run hf auth login, or set HF_TOKEN",
}
_NO_CREDENTIALS = {
    "NoCredentialsError",
    "PartialCredentialsError",
    "CredentialRetrievalError",
    "DefaultCredentialsError",
    "LocalTokenNotFoundError",
}
_CONNECTION = {
    "TimeoutError",
    "ConnectionError",
    "HTTPClientError",  # botocore
    "ClientConnectionError",  # aiohttp
    "ClientPayloadError",
    "TransportError",  # httpx
    "IncompleteRead",
}
"""Classes of errors that may pass; by name, since their packages need not be installed."""
_BUSY_STATUS = (408, 429, 500, 502, 503, 504)
_PATIENCE_S, _TRIES, _FIRST_WAIT_S = 60.0, 6, 0.5


class RemoteFile(NamedTuple):
    """What a listing says. version: another one when the content was replaced."""

    n_bytes: int
    version: str


class RemoteFiles:
    """root: the URL without a password, as messages have it. Names are relative to it."""

    def __init__(self, file_system: Any, path: str, root: str):
        self._fs, self._path, self.root = file_system, path.rstrip("/"), root
        protocol = file_system.protocol
        self._protocol = str(protocol if isinstance(protocol, str) else protocol[0])
        self._folders: set[str] = set()

    @classmethod
    def open(cls, url: str) -> "RemoteFiles":
        """Raises: CacheError: unknown protocol, missing package, no credentials, no bucket."""
        root = re.sub(r"//[^/@:]*:[^/@]*@", "//", url).rstrip("/")
        protocol = url.partition("://")[0]
        if protocol not in known_implementations:
            raise CacheError(
                f"{root} has the unknown protocol {protocol!r}: use a folder, s3://, gs://, hf:// "
                "or another one that fsspec knows"
            )
        try:
            file_system, path = url_to_fs(url, use_listings_cache=False)
        except ImportError as error:
            package, extra = _EXTRAS.get(protocol, ("", ""))
            way = f"{package}: pip install 'saebase[{extra}]'" if package else f"more: {error}"
            raise CacheError(f"{root} needs {way}") from error
        except Exception as error:
            raise _told(root, protocol, error, {}) from error
        files = cls(file_system, path, root)
        files._probe()
        return files

    def child(self, folder: str) -> "RemoteFiles":
        """The files of a folder inside."""
        return RemoteFiles(self._fs, self._at(folder), f"{self.root}/{folder}")

    @property
    def is_exclusive(self) -> bool:
        """Whether the service itself makes sure that of two who create a file one fails."""
        return self._protocol in (*S3, *GCS, "memory")

    def listed(self, folder: str = "") -> dict[str, RemoteFile]:
        """What lies directly in a folder, folders included; nothing if it is missing."""
        path = self._at(folder)
        self._fs.invalidate_cache(path)
        try:
            found = self._call("ls", path, detail=True)
        except FileNotFoundError:
            return {}
        bare = path.strip("/")
        if [each["name"].strip("/") for each in found] == [bare] and found[0]["type"] == "file":
            if found[0]["name"].endswith("/"):  # an empty object that stands for the folder
                return {}
            raise CacheError(f"{self.root} is a file: choose a folder")
        return {
            each["name"].rstrip("/").rpartition("/")[2]: RemoteFile(
                int(each.get("size") or 0), _version(each)
            )
            for each in found
            if each["name"].strip("/") != bare
        }

    def has(self, name: str) -> bool:
        """Whether there is a file of that name."""
        self._fs.invalidate_cache(self._at(name))
        try:
            return bool(self._call("info", self._at(name))["type"] == "file")
        except FileNotFoundError:
            return False

    def read(self, name: str, begin: int | None = None, end: int | None = None) -> bytes:
        """A file, or bytes begin..end-1 of it. Raises: FileNotFoundError, CacheError."""
        # without a range, s3fs would ask for the size first, to read in several parts
        plain = {"max_concurrency": 1} if self._protocol in S3 else {}
        return bytes(self._call("cat_file", self._at(name), start=begin, end=end, **plain))

    def upload(self, local: Path, name: str) -> None:
        """A local file, which appears whole or not at all. Raises: CacheError."""
        path = self._at(name)
        parts = {"chunksize": _PART_BYTES} if self._protocol in (*S3, *GCS) else {}
        if self._protocol in _WHOLE:
            self._call("put_file", str(local), path, **parts)
            return
        self._make_folder(path)
        self._call("put_file", str(local), f"{path}.partial")
        self._call("mv", f"{path}.partial", path)

    def create(self, name: str, data: bytes) -> bool:
        """A small file, unless there is one: then False. Raises: CacheError."""
        path = self._at(name)
        self._make_folder(path)
        try:
            self._call("pipe_file", path, data, mode="create")
        except FileExistsError:
            return False
        except CacheError as error:
            codes = _codes(error)
            if codes & {"PreconditionFailed", "ConditionalRequestConflict", 412, 409}:
                return False
            if not codes & {"NotImplemented", 501}:
                raise
            self._call("pipe_file", path, data)
        return True

    def replace(self, name: str, data: bytes) -> None:
        """A small file, in the place of one that may be there. Raises: CacheError."""
        self._call("pipe_file", self._at(name), data)

    def remove(self, name: str) -> None:
        """Remove a file, if it is there. Raises: CacheError."""
        try:
            self._call("rm_file", self._at(name))
        except FileNotFoundError:
            return

    def _at(self, name: str) -> str:
        return f"{self._path}/{name}" if name else self._path

    def _make_folder(self, path: str) -> None:
        folder = path.rpartition("/")[0]
        if self._protocol not in _WHOLE and folder not in self._folders:
            self._call("makedirs", folder, exist_ok=True)
            self._folders.add(folder)

    def _probe(self) -> None:
        """One request, tried once: is the place in reach?"""
        try:
            self._call("ls", self._path, detail=False, tries=1)
        except FileNotFoundError as error:
            bucket = self._bucket()
            if bucket and not self._call("exists", bucket, tries=1):
                kind = "repository" if self._protocol == "hf" else "bucket"
                raise CacheError(
                    f"{self.root}: there is no {kind} {bucket}: make it first, or check its name "
                    "and whose it is"
                ) from error

    def _bucket(self) -> str:
        parts = self._path.strip("/").split("/")
        n = _BUCKETS.get(self._protocol, 0)
        if self._protocol == "hf" and parts[0] not in ("datasets", "spaces", "buckets"):
            n = 2
        return "/".join(parts[:n])

    def _call(self, method: str, *arguments: Any, tries: int = _TRIES, **options: Any) -> Any:
        """Every call of the file system. Raises: FileNotFoundError, FileExistsError, CacheError."""
        work = partial(getattr(self._fs, method), *arguments, **options)
        try:
            return _patiently(work, tries)
        except (FileNotFoundError, FileExistsError):
            raise
        except Exception as error:
            raise _told(self.root, self._protocol, error, self._fs.storage_options) from error


def _patiently(work: Callable[[], Any], tries: int) -> Any:
    """Try again what may pass, after longer and longer waits. Raises: the last error."""

    def tell(state: RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        log.debug("trying again after %s", type(error).__name__)

    return Retrying(
        retry=retry_if_exception(_may_pass),
        stop=stop_after_attempt(tries) | stop_after_delay(_PATIENCE_S),
        wait=wait_random_exponential(multiplier=_FIRST_WAIT_S, max=15),
        before_sleep=tell,
        reraise=True,
    )(work)


def _may_pass(error: BaseException) -> bool:
    return bool(_kinds(error) & _CONNECTION or _codes(error) & set(_BUSY_STATUS))


def _told(root: str, protocol: str, error: Exception, options: Mapping[str, Any]) -> CacheError:
    """A fault of a file system in one line, with the way out."""
    kinds, codes = _kinds(error), _codes(error)
    code = next((f" ({code})" for code in codes if isinstance(code, str)), "")
    if kinds & _NO_CREDENTIALS:
        way = _LOGIN.get(protocol, f"see what fsspec says of {protocol}://")
        return CacheError(f"no credentials for {root}: {way}")
    if "PermissionError" in kinds or codes & {401, 403}:
        return CacheError(
            f"access to {root} was refused{code}: check the credentials, and what they may do there"
        )
    said = _without_secrets(" ".join(str(error).split())[:300] or type(error).__name__, options)
    if _may_pass(error):
        return CacheError(
            f"{root} can't be reached{code}: {said}. What was committed is safe: check the "
            "network and the address, and run it again"
        )
    return CacheError(f"{root} can't be used{code}: {said}")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _kinds(error: BaseException) -> set[str]:
    """Names of all classes that an error and its causes are of."""
    return {kind.__name__ for each in _chain(error) for kind in type(each).__mro__}


def _codes(error: BaseException) -> set[str | int]:
    """HTTP statuses, and the names that S3 has for errors."""
    codes: set[str | int] = set()
    for each in _chain(error):
        response = getattr(each, "response", None)
        if isinstance(response, Mapping):  # botocore
            codes.add(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
            codes.add(str(response.get("Error", {}).get("Code", "")))
        codes.add(getattr(response, "status_code", 0))  # requests, httpx
        codes |= {c for c in (getattr(each, n, 0) for n in ("status", "code")) if _is_status(c)}
        if isinstance(each, NotImplementedError) or getattr(each, "errno", 0) == errno.ENOSYS:
            codes.add(501)
    return {code for code in codes if code}


def _is_status(code: object) -> bool:
    return isinstance(code, int) and 400 <= code < 600


def _without_secrets(text: str, options: Mapping[str, Any]) -> str:
    for name, value in options.items():
        if isinstance(value, Mapping):
            text = _without_secrets(text, value)
        elif isinstance(value, str) and value and re.search(_SECRET, name, re.IGNORECASE):
            text = text.replace(value, "***")
    text = re.sub(r"[^/@\s\"']*:[^/@\s\"']*@", "***@", text)
    return re.sub(rf"((?:{_SECRET})[\w-]*=)[^&\s\"']+", r"\1***", text, flags=re.IGNORECASE)


_SECRET = "secret|token|password|key|credential|signature|sig"


def _version(listing: Mapping[str, Any]) -> str:
    """What of a listing changes when a file is replaced, whatever the file system calls it."""
    return repr([(name, str(listing[name])) for name in _VERSION_FIELDS if name in listing])


_VERSION_FIELDS = (
    "size",
    "ETag",
    "etag",
    "md5Hash",
    "generation",
    "oid",
    "blob_id",
    "xet_hash",
    "LastModified",
    "last_modified",
    "updated",
    "mtime",
    "created",
)
