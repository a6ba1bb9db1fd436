"""RangedFile: a file that pyarrow reads, of which ranges of bytes come from somewhere else."""

import io
import os
from abc import abstractmethod


class RangedFile(io.RawIOBase):
    """A file of n_bytes. Threads take turns: pyarrow sees to it."""

    def __init__(self, n_bytes: int) -> None:
        super().__init__()
        self._n_bytes, self._at = n_bytes, 0

    @abstractmethod
    def range(self, begin: int, end: int) -> bytes:
        """Bytes begin..end-1. Raises: OSError, of which pyarrow passes on the words."""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def size(self) -> int:
        """Bytes of the file."""
        return self._n_bytes

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._n_bytes}[whence]
        self._at = base + offset
        return self._at

    def read(self, n_bytes: int = -1) -> bytes:
        """Raises: as `range`."""
        end = self._n_bytes if n_bytes < 0 else min(self._at + n_bytes, self._n_bytes)
        begin, self._at = self._at, end
        return self.range(begin, end)
