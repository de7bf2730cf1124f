"""A registry's blob as a file, gone on with where a connection broke."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from weightctl.errors import IntegrityError
from weightctl.images.oci import Descriptor
from weightctl.images.transport import BLOCK_BYTES, Patience, RegistryError, reason

if TYPE_CHECKING:
    import requests


class BlobReader(io.RawIOBase):
    """Reads from any offset; whoever reads compares the digest."""

    def __init__(self, blob: Descriptor, name: str, open_at: Callable[[int], requests.Response]) -> None:
        """`open_at` asks for the bytes from an offset on; all of them will do. `name` is for errors."""
        self.name = name
        self._blob = blob
        self._open_at = open_at
        self._position = 0
        self._response: requests.Response | None = None
        self._patience = Patience()

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def tell(self) -> int:
        """The offset of the next byte."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to an offset, as any file does."""
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._blob.size}[whence]
        if origin + offset != self._position:
            self._disconnect()
            self._position = origin + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Up to one byte more than the blob should have: whoever reads it sees that it has too many."""
        import urllib3

        view = memoryview(buffer).cast("B")[: self._blob.size + 1 - self._position]
        while len(view):
            try:
                data = self._connected().raw.read(len(view), decode_content=False)
            except (urllib3.exceptions.HTTPError, OSError) as error:
                self._disconnect()
                broken = RegistryError(f"cannot read {self.name}: the connection broke: {reason(error)}")
                self._patience.wait(broken)
                continue
            if not data and self._position < self._blob.size:
                raise IntegrityError(f"{self.name} has {self._position} bytes instead of {self._blob.size}")
            if data:
                self._patience.reset()
            view[: len(data)] = data
            self._position += len(data)
            return len(data)
        return 0

    def close(self) -> None:
        """Also ends the connection."""
        self._disconnect()
        super().close()

    def _connected(self) -> requests.Response:
        while self._response is None:
            try:
                self._response = self._open_at(self._position)
            except RegistryError as error:
                if not error.transient:
                    raise
                self._patience.wait(error)
                continue
            skip = self._position - _start_of(self._response, self._position)
            if skip < 0:
                self._disconnect()
                raise IntegrityError(f"{self.name} is sent without the bytes that follow the first {self._position}")
            while skip and (data := self._response.raw.read(min(skip, BLOCK_BYTES), decode_content=False)):
                skip -= len(data)
        return self._response

    def _disconnect(self) -> None:
        if self._response is not None:
            self._response.close()
            self._response = None


def _start_of(response: requests.Response, asked: int) -> int:
    """The offset of an answer's first byte, for one that may hold only the bytes from `asked` on."""
    if response.status_code != 206:
        return 0
    said = re.match(r"bytes (\d{1,19})-", response.headers.get("Content-Range", ""))
    return int(said[1]) if said else asked
