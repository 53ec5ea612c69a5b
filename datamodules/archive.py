"""A tar file read once from its start to its end, however hostile: what it holds, or one reason why not.

:mod:`tarfile` parses the headers. What it takes silently is refused here: a damaged or zeroed header, which it takes
for the end; what follows the end of the first of several archives in one file; and sizes that a header only claims.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import tarfile
from collections.abc import Callable, Iterator
from typing import BinaryIO, cast

from typing_extensions import override

BLOCK = tarfile.BLOCKSIZE
# Archives are padded with zeros to records of twenty blocks; at least two blocks of zeros end one.
RECORD = 20 * BLOCK
# Of the last record, whatever its size was.
LONGEST_PADDING = 4 * 2**20
# Long names, links and attributes of one file, all together: paths have at most 4 KiB.
LONGEST_HEADERS = 16 * 2**10
# Of one file that is read: the text states of the largest encoders have some 10 MB, latents of a video some 50.
LARGEST_FILE = 256 * 2**20
# Of one compressed shard: latents hardly shrink. So much is unpacked whatever the rate.
HIGHEST_RATE = 100
UNPACKED_FREELY = 256 * 2**20
_PACKED: dict[bytes, Callable[[BinaryIO], BinaryIO]] = {
    b"\x1f\x8b": lambda stream: cast(BinaryIO, gzip.GzipFile(fileobj=stream)),
    b"BZh": lambda stream: cast(BinaryIO, bz2.BZ2File(stream)),
    b"\xfd7zXZ": lambda stream: cast(BinaryIO, lzma.LZMAFile(stream)),  # noqa: SIM115
}


class Archive:
    """The files of a tar file, which may be packed with gzip, bzip2 or xz, or be several archives joined.

    Args:
        stream: Its bytes, buffered; closed by whoever opened it.
        position: How many bytes of the (packed) file were read so far.
    """

    def __init__(self, stream: BinaryIO, position: Callable[[], int]) -> None:
        start = stream.peek(8)[:8]  # type: ignore[attr-defined]
        unpack = next((unpack for magic, unpack in _PACKED.items() if start.startswith(magic)), None)
        self._stream = _Forward(stream if unpack is None else unpack(stream), None if unpack is None else position)

    def files(self, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
        """The regular files, in their order.

        Args:
            wanted: By name, which are read; of others the content is passed over.

        Yields:
            Name and content; the content is empty where it isn't wanted.

        Raises:
            OSError: If its bytes can't be read.
            tarfile.ReadError: If it can't be read to its end, holds what is no regular file and no folder, or a file
                that is too large.
        """
        archive = None
        while True:
            self._stream.headers = 0
            try:
                if archive is None:
                    # It reads the first header at once.
                    archive = tarfile.TarFile(
                        fileobj=cast(BinaryIO, self._stream), tarinfo=_headers_of(self._stream), ignore_zeros=True
                    )
                member = archive.next()
                if member is None:
                    return
                content = self._content(member, wanted)
            except (tarfile.ReadError, OSError):  # the latter says itself what is wrong with the bytes
                raise
            except RecursionError:
                raise tarfile.ReadError(f"it is damaged at byte {self._stream.tell()}: headers without end") from None
            except Exception as error:  # damaged bytes make tarfile and the decompressors raise nearly anything
                reason = str(error) or type(error).__name__
                raise tarfile.ReadError(f"it is damaged at byte {self._stream.tell()}: {reason}") from None
            archive.members = []  # type: ignore[attr-defined]  # it would keep the headers of all files
            if content is not None:
                yield member.name, content

    def _content(self, member: tarfile.TarInfo, wanted: Callable[[str], bool]) -> bytes | None:
        if member.isdir():
            return None
        what = f"its file {member.name!r} at byte {member.offset}"
        if member.issparse():
            raise tarfile.ReadError(f"{what} is sparse; pack it without --sparse")
        if not member.isreg():
            kind = member.type.decode("ascii", "replace")
            raise tarfile.ReadError(
                f"{what} is a link, a device or the like (kind {kind!r}); pack it with --dereference --hard-dereference"
            )
        if member.size < 0:
            raise tarfile.ReadError(f"{what} has a size of {member.size} bytes")
        if not wanted(member.name):
            return b""
        if member.size > LARGEST_FILE:
            raise tarfile.ReadError(f"{what} is {member.size} bytes long, more than {LARGEST_FILE}")
        self._stream.headers = -member.size
        content = self._stream.read(member.size)
        if len(content) < member.size:
            raise tarfile.ReadError(f"it is cut off within {member.name!r}, at byte {self._stream.tell()}")
        return content


def _headers_of(stream: _Forward) -> type[tarfile.TarInfo]:
    class Header(tarfile.TarInfo):
        # tarfile shows each block that should be a header here, before it does what the block says.
        @classmethod
        @override
        def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Header:
            place = stream.tell() - len(buf)
            if not any(buf) and (len(buf) == BLOCK or stream.zeros):
                stream.zeros += len(buf) == BLOCK
                stream.headers = 0
                if BLOCK * stream.zeros > LONGEST_PADDING:
                    raise tarfile.ReadError(f"from byte {place + BLOCK - BLOCK * stream.zeros} on it is all zeros")
                missing = "what a header announces is not there"
                # These two tell tarfile apart what it may pass over and what ends the file.
                raise tarfile.EOFHeaderError(missing) if buf else tarfile.EmptyHeaderError(missing)  # type: ignore[attr-defined]
            stream.join(place)
            try:
                return super().frombuf(buf, encoding, errors)
            except tarfile.HeaderError as error:
                what = "it is no tar file, or damaged," if len(buf) == BLOCK else "it is cut off"
                raise tarfile.ReadError(f"{what} at byte {place}: {error}") from None
            except ValueError as error:
                raise tarfile.ReadError(f"it is damaged at byte {place}: {error}") from None

    return Header


class _Forward:
    """What tarfile reads from: it tells where it is, only goes forward, and bounds what is read.

    Attributes:
        headers: Bytes read since the last file; a file's content is taken off.
        zeros: Blocks of zeros since the last header.
    """

    def __init__(self, stream: BinaryIO, packed: Callable[[], int] | None) -> None:
        self._stream = stream
        self._packed = packed
        self._position = 0
        self._first = 0  # where this archive begins, of several that are joined
        self.headers = 0
        self.zeros = 0

    def join(self, place: int) -> None:
        """Refuse a header after zeros that don't end an archive.

        Args:
            place: The header's.

        Raises:
            tarfile.ReadError: If the zeros before it stand where headers should.
        """
        if not self.zeros:
            return
        padded = 2 <= self.zeros <= RECORD // BLOCK + 1 and (place - self._first) % RECORD == 0
        if not padded and self.zeros != 2:
            first = place - BLOCK * self.zeros
            raise tarfile.ReadError(f"it is damaged at byte {first}: {BLOCK * self.zeros} zeros stand before a file")
        self._first, self.zeros = place, 0

    def tell(self) -> int:
        return self._position

    def read(self, size: int) -> bytes:
        self.headers += size
        if self.headers > LONGEST_HEADERS:
            raise tarfile.ReadError(f"the headers before byte {self._position} are longer than {LONGEST_HEADERS} bytes")
        return self._read(size)

    def seek(self, position: int) -> None:
        if position < self._position:
            raise tarfile.ReadError(f"a header before byte {self._position} leads back to byte {position}")
        while self._position < position and self._read(min(2**20, position - self._position)):
            pass

    def _read(self, size: int) -> bytes:
        content = self._stream.read(size)
        self._position += len(content)
        if self._packed is not None and self._position > max(UNPACKED_FREELY, HIGHEST_RATE * self._packed()):
            raise tarfile.ReadError(f"it unpacks to more than {HIGHEST_RATE} times its size")
        return content
