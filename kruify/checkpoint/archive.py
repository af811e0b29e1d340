"""Zip archives, opened strictly: every check that the usual readers leave out, and a pass over every checksum."""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from kruify.checkpoint import limits
from kruify.checkpoint.file_bytes import AGAIN, CHUNK, chunks
from kruify.errors import CorruptError, UnsafeError

_ENCRYPTED = 0x1
_LOCAL_HEADER = 30
_DESCRIPTOR = 24
"""Bytes of the longest record that may follow an entry's data."""


class Archive:
    """The entries of a zip file whose names, places, sizes and checksums have all been checked.

    Raises:
        CorruptError: damaged, cut short, a checksum that does not match, entries that overlap or are there twice.
        UnsafeError: beyond the limits, or entry names that leave the archive.
    """

    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self.path, self.file, self.size = path, file, size
        count = _check_directory(path, file, size)
        try:
            self._zip = zipfile.ZipFile(file)
        except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError, struct.error) as error:
            raise CorruptError(f"its archive is damaged ({error})", path, AGAIN) from error
        self.entries: dict[str, zipfile.ZipInfo] = {}
        if len(self._zip.infolist()) > limits.ENTRIES:
            raise UnsafeError(f"its archive has {len(self._zip.infolist())} entries", path)
        if len(self._zip.infolist()) != count:
            raise CorruptError("its archive does not have the entries that it says", path, AGAIN)
        for entry in self._zip.infolist():
            self._check_entry(entry)
            self.entries[entry.filename] = entry
        self.directory, self.listed = self._zip.start_dir, self._zip.infolist()
        self._starts = self._check_places()
        self._check_sums()

    def __contains__(self, name: str) -> bool:
        return name in self.entries

    def start(self, name: str) -> int:
        """Offset in the file of the bytes of a stored entry."""
        return self._starts[name]

    def refuse_compressed(self) -> None:
        """Raise UnsafeError if an entry is compressed that torch stores as it is: all but TorchScript's sources."""
        for name, entry in self.entries.items():
            if entry.compress_type != zipfile.ZIP_STORED and "/code/" not in name:
                raise UnsafeError(f"its entry {name[:80]} is compressed, which torch never does", self.path)

    def read(self, name: str, limit: int) -> bytes:
        """All bytes of an entry of at most `limit` bytes."""
        if name not in self.entries:
            raise CorruptError(f"its archive lacks {name[:80]}", self.path, AGAIN)
        if self.entries[name].file_size > limit:
            raise UnsafeError(f"{name[:80]} takes {self.entries[name].file_size} bytes, more than {limit}", self.path)
        return b"".join(self.chunks(name))

    def chunks(self, name: str) -> Iterator[bytes]:
        """The bytes of an entry, a few at a time, never more than its directory says."""
        entry = self.entries[name]
        self.file.seek(self._starts[name])
        left, unpack = entry.compress_size, zlib.decompressobj(-15)
        if entry.compress_type == zipfile.ZIP_STORED:
            yield from chunks(self.file, left)
            return
        position, written = self._starts[name], 0
        while (left or unpack.unconsumed_tail) and not unpack.eof:
            data = unpack.unconsumed_tail
            if not data:
                self.file.seek(position)
                data = self.file.read(min(left, CHUNK))
                position, left = position + len(data), left - len(data)
            out = unpack.decompress(data, CHUNK)
            written += len(out)
            if written > entry.file_size or not (data or out):
                raise CorruptError(f"its entry {name[:80]} is damaged", self.path, AGAIN)
            yield out

    def _check_entry(self, entry: zipfile.ZipInfo) -> None:
        name = entry.filename
        if name in self.entries:
            raise CorruptError(f"its archive has the entry {name[:80]} twice", self.path, AGAIN)
        if len(name) > limits.NAME or entry.orig_filename != name:
            raise UnsafeError("its archive has an entry with an unusable name", self.path)
        # torch names the folder in the archive after the file, which may well be called 10:30.pt.
        if name.startswith("/") or "\\" in name or name[1:3] == ":/" or ".." in name.split("/"):
            raise UnsafeError(f"its archive has an entry named {name[:80]!r}, outside of the archive", self.path)
        if entry.flag_bits & _ENCRYPTED:
            raise CorruptError(f"its entry {name[:80]} is encrypted", self.path)
        stored = entry.compress_type == zipfile.ZIP_STORED
        if not stored and entry.compress_type != zipfile.ZIP_DEFLATED:
            raise UnsafeError(f"its entry {name[:80]} is compressed in an unusual way", self.path)
        if stored and entry.file_size != entry.compress_size:
            raise CorruptError(f"its entry {name[:80]} has two sizes", self.path, AGAIN)
        if entry.file_size > limits.RATIO * self.size + limits.SLACK:
            raise UnsafeError(f"its entry {name[:80]} unpacks to {entry.file_size} bytes", self.path)

    def _check_places(self) -> dict[str, int]:
        """Where the bytes of each entry start: entries must tile the file in order, the first at its beginning."""
        starts: dict[str, int] = {}
        end = slack = 0
        for entry in sorted(self.entries.values(), key=lambda e: e.header_offset):
            self.file.seek(entry.header_offset)
            header = self.file.read(_LOCAL_HEADER)
            if (
                len(header) < _LOCAL_HEADER
                or header[:4] != b"PK\x03\x04"
                or not 0 <= entry.header_offset - end <= slack
            ):
                raise CorruptError("its archive has entries that overlap or are missing", self.path, AGAIN)
            if not starts and entry.header_offset != 0:
                raise CorruptError("it has something before its archive", self.path, AGAIN)
            name_length, extra_length = struct.unpack("<HH", header[26:30])
            raw = self.file.read(name_length)
            if raw != entry.orig_filename.encode("utf-8" if entry.flag_bits & 0x800 else "cp437", "replace"):
                raise CorruptError("its archive names an entry in two ways", self.path, AGAIN)
            starts[entry.filename] = start = entry.header_offset + _LOCAL_HEADER + name_length + extra_length
            end = start + entry.compress_size
            slack = _DESCRIPTOR if entry.flag_bits & 0x08 else 0
            if end > self._zip.start_dir:
                raise CorruptError("its archive has an entry beyond its end", self.path, AGAIN)
        if self._zip.start_dir - end > slack:
            raise CorruptError("its archive has entries that overlap or are missing", self.path, AGAIN)
        return starts

    def _check_sums(self) -> None:
        for name, entry in self.entries.items():
            total = length = 0
            try:
                for chunk in self.chunks(name):
                    total, length = zlib.crc32(chunk, total), length + len(chunk)
            except zlib.error as error:
                raise CorruptError(f"its entry {name[:80]} is damaged", self.path, AGAIN) from error
            if total != entry.CRC or length != entry.file_size:
                raise CorruptError(f"its entry {name[:80]} does not match its checksum", self.path, AGAIN)


def _check_directory(path: Path, file: BinaryIO, size: int) -> int:
    """Number of entries that the directory claims.

    An absurd one is refused here, before `zipfile` builds a Python object for each of its entries.
    """
    tail = min(size, 22 + 0xFFFF)
    file.seek(size - tail)
    data = file.read(tail)
    at = data.rfind(b"PK\x05\x06")
    if at < 0 or len(data) - at < 22:
        raise CorruptError("its archive has no directory; it is cut short", path, AGAIN)
    count, length = struct.unpack("<HI", data[at + 10 : at + 16])
    if at >= 20 and data[at - 20 : at - 16] == b"PK\x06\x07":
        (offset,) = struct.unpack("<Q", data[at - 12 : at - 4])
        file.seek(min(offset, size))
        record = file.read(56)
        if len(record) < 56 or record[:4] != b"PK\x06\x06":
            raise CorruptError("its archive's directory is damaged", path, AGAIN)
        count, length = struct.unpack("<QQ", record[32:48])
    if count > limits.ENTRIES or length > limits.DIRECTORY:
        raise UnsafeError(f"its archive claims {count} entries in {length} bytes", path)
    return int(count)
