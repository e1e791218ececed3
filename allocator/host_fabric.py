"""The host driver's fabric handles: 64 bytes by which any process of this machine, of the same user, finds memory.

[Note: Nobody owns a name]
A fabric handle is a name and keeps nothing alive. It has the identity of a memory file, which is also the file's own
name; and, as a hint, one process and descriptor that had the file when the name was made:

    | magic | machine | identity | descriptor | process | zeros |
    0       8        24         40           44        48      64

To resolve a name is to look at the hint, and where that process has ended, at every other that may be looked at, until
one has a descriptor of a file of this name. So it works as long as anybody holds the memory, as with a GPU's; nothing
is registered anywhere, and what killed processes leave is what the kernel removes anyway.
"""

from __future__ import annotations

import os
import re
import secrets
import struct
from collections.abc import Iterator
from typing import Final

from vmm_dwdp.allocator import host_pages
from vmm_dwdp.allocator.driver import FABRIC_NBYTES
from vmm_dwdp.allocator.machine import MACHINE_NBYTES, machine_id
from vmm_dwdp.errors import DriverError

_INVALID_VALUE: Final = "CUDA_ERROR_INVALID_VALUE"
_IDENTITY_NBYTES: Final = 16
_LAYOUT: Final = struct.Struct(f"!8s{MACHINE_NBYTES}s{_IDENTITY_NBYTES}sII16x")
_MAGIC: Final = b"HOSTFAB1"
_NAME: Final = "vmm_dwdp-fabric-"
_LINK: Final = re.compile(rf"/memfd:{_NAME}([0-9a-f]{{{2 * _IDENTITY_NBYTES}}}) \(deleted\)")


def create_file(nbytes: int) -> int:
    """`host_pages.create_file`, of a name that no other has."""
    return host_pages.create_file(nbytes, _NAME + secrets.token_hex(_IDENTITY_NBYTES))


def name_of(fd: int) -> bytes:
    """The fabric handle of a file that `create_file` made, here or in another process."""
    found = _LINK.fullmatch(_link(f"/proc/self/fd/{fd}") or "")
    if found is None:
        raise DriverError("export", _INVALID_VALUE, f"name descriptor {fd}, which is no memory for fabric handles")
    return _LAYOUT.pack(_MAGIC, machine_id(), bytes.fromhex(found[1]), fd, os.getpid())


def open_file(name: bytes) -> int:
    """A new descriptor of the file that ``name`` names."""
    if len(name) != FABRIC_NBYTES or not name.startswith(_MAGIC):
        raise DriverError("import", _INVALID_VALUE, f"import {len(name)} bytes that are no fabric handle of a host")
    _, machine, identity, fd, process = _LAYOUT.unpack(name)
    if machine != machine_id():
        raise DriverError("import", _INVALID_VALUE, "import a fabric handle of another machine")
    link = f"/memfd:{_NAME}{identity.hex()} (deleted)"
    for path in (f"/proc/{process}/fd/{fd}", *_descriptors()):
        if _link(path) == link:
            try:
                found = host_pages.open_file(path)
            except DriverError:  # it has just been closed there
                continue
            if _link(f"/proc/self/fd/{found}") == link:
                return found
            os.close(found)  # and another file has its number
    raise DriverError("import", _INVALID_VALUE, "import a fabric handle whose memory nobody holds any more")


def _descriptors() -> Iterator[str]:
    """Of all processes that this one may look at."""
    for process in filter(str.isdigit, os.listdir("/proc")):
        try:
            yield from (f"/proc/{process}/fd/{fd}" for fd in os.listdir(f"/proc/{process}/fd"))
        except OSError:  # it has ended, or is somebody else's
            continue


def _link(path: str) -> str | None:
    try:
        return os.readlink(path)
    except OSError:
        return None
