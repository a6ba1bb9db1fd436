"""Who may write to a remote folder: a small object that its holder renews.

In: the files of a folder. Out: `Lease`, held while a context is open. It is created exclusively,
renewed by a thread, and free to be taken over when it was not renewed for five minutes (as the
clocks of both machines tell), or at once when its holder ran on this machine and is no more. A
holder looks whether it still holds it before every file that it commits.
"""

import json
import logging
import os
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

from pydantic import BaseModel, ConfigDict, ValidationError

from .durable import LOCK
from .errors import CacheBusy, CacheError
from .remote_files import RemoteFiles

log = logging.getLogger(__name__)

RENEW_S = 100.0
STALE_S = 300.0
SETTLE_S = 1.0
"""What two who take over at the same time wait before they look which of them won."""


class _Held(BaseModel):
    """What the object says. token: of one holding. machine: see `BlockCache.machine`."""

    model_config = ConfigDict(frozen=True)

    host: str
    pid: int
    machine: str
    token: str
    renewed_at: float

    @property
    def age_s(self) -> float:
        return time.time() - self.renewed_at


class Lease:
    """The right to write to a folder. machine: see `BlockCache.machine`.

    Only for who holds the folder's lock on this machine: a lease of this machine is then left over.
    """

    def __init__(self, files: RemoteFiles, machine: str):
        self._files, self._machine, self._token = files, machine, uuid.uuid4().hex
        self._is_over = threading.Event()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Raises: CacheBusy that names the holder, CacheError."""
        self._acquire()
        heart = threading.Thread(target=self._beat, name="lease", daemon=True)
        heart.start()
        try:
            yield
        finally:
            self._is_over.set()
            heart.join()
            self._release()

    def require(self) -> None:
        """Raises: CacheBusy if the lease is another's by now."""
        found = self._read()
        if found is None or found.token != self._token:
            raise self._busy(found)

    def _acquire(self) -> None:
        is_taken_over, found = False, self._read()
        if found is not None:
            if not self._is_left_over(found):
                raise self._busy(found)
            log.warning("%s: taking over from %s", self._files.root, _holder(found))
            self._files.remove(LOCK)
            is_taken_over = True
        self._files.create(LOCK, self._content())
        if is_taken_over or not self._files.is_exclusive:
            time.sleep(SETTLE_S)
        self.require()

    def _is_left_over(self, found: _Held) -> bool:
        is_from_here = found.machine == self._machine and found.host == os.uname().nodename
        return is_from_here or found.age_s > STALE_S

    def _beat(self) -> None:
        while not self._is_over.wait(RENEW_S):
            try:
                self.require()
                self._files.replace(LOCK, self._content())
            except CacheBusy:  # told before the next commit
                return
            except CacheError as error:
                log.warning("can't renew the lease: %s", error)

    def _release(self) -> None:
        try:
            self.require()
            self._files.remove(LOCK)
        except CacheBusy:
            return
        except CacheError as error:
            log.warning("can't release the lease, which will be free in a while: %s", error)

    def _read(self) -> _Held | None:
        try:
            return _Held.model_validate_json(self._files.read(LOCK))
        except FileNotFoundError:
            return None
        except ValidationError:
            return _UNREADABLE

    def _content(self) -> bytes:
        held = _Held(
            host=os.uname().nodename,
            pid=os.getpid(),
            machine=self._machine,
            token=self._token,
            renewed_at=time.time(),
        )
        return json.dumps(held.model_dump()).encode()

    def _busy(self, found: _Held | None) -> CacheBusy:
        if found is None or found is _UNREADABLE:
            return CacheBusy(
                f"{self._files.root} is held by nobody that can be named: its {LOCK} is missing or "
                "can't be read. See that nobody writes there, remove it and run it again"
            )
        return CacheBusy(
            f"{self._files.root} is being written by {_holder(found)} (seen {found.age_s:,.0f} s "
            f"ago; given up after {STALE_S:,.0f} s): wait for it, or choose another folder"
        )


_UNREADABLE = _Held(host="", pid=0, machine="", token="", renewed_at=float("inf"))


def _holder(found: _Held) -> str:
    return f"process {found.pid} on {found.host}"
