"""What the operating system allows one process, checked before anything is taken."""

from __future__ import annotations

import os
import resource

from vmm_dwdp.errors import ConfigError


def allow_descriptors(count: int) -> None:
    """Let this process open ``count`` more files, raising its soft limit if need be.

    Raises `ConfigError` if the hard limit is lower, or if not even the open ones can be counted.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        needed = len(os.listdir("/proc/self/fd")) + count
    except OSError as error:
        raise ConfigError(f"the open files of this process cannot be counted: {error.strerror}") from error
    if hard != resource.RLIM_INFINITY and needed > hard:
        raise ConfigError(
            f"sharing memory with the other ranks takes {count} file descriptors, but a process may open {hard}"
        )
    if soft != resource.RLIM_INFINITY and needed > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
