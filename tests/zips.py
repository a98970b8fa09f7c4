"""Give an edited zip the checksums of its new bytes, as a trainer that wrote them would have."""

from __future__ import annotations

import io
import os
import struct
import zipfile
from pathlib import Path

from isal import isal_zlib

_DESCRIPTOR = b"PK\x07\x08"


def restamp(file: Path, offset: int = 0, length: int | None = None) -> None:
    """Correct every CRC-32 of the zip at `offset` of `file`, and keep the file's times."""
    stat = file.stat()
    whole = bytearray(file.read_bytes())
    end = len(whole) if length is None else offset + length
    data = whole[offset:end]
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        infos, at = archive.infolist(), archive.start_dir
    for info in infos:
        name, extra = struct.unpack_from("<2H", data, info.header_offset + 26)
        start = info.header_offset + 30 + name + extra
        after = start + info.file_size
        crc = struct.pack("<I", isal_zlib.crc32(bytes(data[start:after])))
        data[at + 16 : at + 20] = crc
        if data[after : after + 4] == _DESCRIPTOR:
            data[after + 4 : after + 8] = crc
        else:
            data[info.header_offset + 14 : info.header_offset + 18] = crc
        at += 46 + sum(struct.unpack_from("<3H", data, at + 28))
    whole[offset:end] = data
    file.write_bytes(whole)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
