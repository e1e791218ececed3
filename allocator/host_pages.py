"""The system calls of the host driver: memory files, address ranges, and their protection.

Every function raises `DriverError` with the name of the system call and of its errno.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from vmm_dwdp.errors import DriverError

PAGE_BYTES: Final = mmap.PAGESIZE
_NO_ACCESS: Final = 0  # PROT_NONE
_MAP_FIXED: Final = 0x10
_MAP_FAILED: Final = ctypes.c_void_p(-1).value
# Neither end of a shared file can cut it, or the other would be killed by SIGBUS.
_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def create_file(nbytes: int, name: str = "vmm_dwdp") -> int:
    """The descriptor of a new memory file of ``nbytes`` zeros, whose size is final; pages are taken when written."""
    attempt = f"create a memory file of {nbytes} bytes"
    with _system_call("memfd_create", attempt):
        fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        with _system_call("ftruncate", attempt):
            os.ftruncate(fd, nbytes)
        with _system_call("fcntl", attempt):
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    except DriverError:
        os.close(fd)
        raise
    return fd


def duplicate(fd: int) -> int:
    """Another descriptor of the same file."""
    with _system_call("dup", f"duplicate descriptor {fd}"):
        return os.dup(fd)


def open_file(path: str) -> int:
    """A descriptor of another process's memory file."""
    with _system_call("open", f"open the memory at {path}"):
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)


def sealed_size(fd: int) -> int | None:
    """Bytes of a memory file whose size is final; None if ``fd`` is anything else."""
    try:
        sealed = fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SEALS == _SEALS
    except OSError:
        return None
    return os.fstat(fd).st_size if sealed else None


def reserve(nbytes: int, alignment: int) -> int:
    """The address of ``nbytes`` that nothing else uses and nobody may touch, a multiple of ``alignment``."""
    whole = nbytes + alignment - PAGE_BYTES  # some multiple of the alignment in it has nbytes after it
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    start = _mmap(0, whole, _NO_ACCESS, flags, -1, f"reserve {nbytes} bytes of addresses")
    address = -(-start // alignment) * alignment
    if address > start:
        remove(start, address - start)
    if start + whole > address + nbytes:
        remove(address + nbytes, start + whole - (address + nbytes))
    return address


def place(address: int, nbytes: int, fd: int) -> None:
    """Put a file at ``address``, over what is there. Nobody may touch it before `protect`."""
    _mmap(address, nbytes, _NO_ACCESS, mmap.MAP_SHARED | _MAP_FIXED, fd, f"map {nbytes} bytes at {address:#x}")


def displace(address: int, nbytes: int) -> None:
    """Undo `place`; the addresses stay reserved."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_FIXED
    _mmap(address, nbytes, _NO_ACCESS, flags, -1, f"unmap {nbytes} bytes at {address:#x}")


def map_anywhere(nbytes: int, fd: int) -> int:
    """The address of a whole file, mapped to be read and written; undo with `remove`."""
    access = mmap.PROT_READ | mmap.PROT_WRITE
    return _mmap(0, nbytes, access, mmap.MAP_SHARED, fd, f"map {nbytes} bytes")


def protect(address: int, nbytes: int, writable: bool) -> None:
    """Let this process read the range, and write it if ``writable``."""
    access = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
    if _libc.mprotect(address, nbytes, access) != 0:
        raise _failure("mprotect", f"set the access of {nbytes} bytes at {address:#x}", ctypes.get_errno())


def remove(address: int, nbytes: int) -> None:
    """Give up the addresses with whatever is mapped there."""
    if _libc.munmap(address, nbytes) != 0:
        raise _failure("munmap", f"give up {nbytes} bytes at {address:#x}", ctypes.get_errno())


def max_mappings() -> int:
    """How many mappings the kernel lets one process have."""
    return int(Path("/proc/sys/vm/max_map_count").read_text(encoding="ascii"))


def _mmap(address: int, nbytes: int, access: int, flags: int, fd: int, attempt: str) -> int:
    result: int | None = _libc.mmap(address, nbytes, access, flags, fd, 0)
    if result is None or result == _MAP_FAILED:
        raise _failure("mmap", attempt, ctypes.get_errno())
    return result


@contextlib.contextmanager
def _system_call(call: str, attempt: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _failure(call, attempt, error.errno or 0) from error


def _failure(call: str, attempt: str, code: int) -> DriverError:
    if code == errno.ENOMEM:
        attempt += f" (a process may have {max_mappings()} mappings, the limit vm.max_map_count)"
    elif code == errno.EMFILE:
        soft_limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        attempt += f" (this process may have {soft_limit} files open, the limit RLIMIT_NOFILE)"
    return DriverError(call, errno.errorcode.get(code, str(code)), attempt)
