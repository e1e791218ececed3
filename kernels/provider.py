"""What a grouped GEMM can be done with, and choosing among that."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from vmm_dwdp.errors import ConfigError
from vmm_dwdp.kernels.problem import Problem

logger = logging.getLogger("vmm_dwdp.kernels")


class Provider(NamedTuple):
    """A kernel somebody offers. It is imported when it is first asked for."""

    name: str  # what `provider=` takes
    supports: str  # architectures, dtypes and alignment, in words
    missing: Callable[[], str | None]  # why it cannot run on this machine at all; None where it can
    refuses: Callable[[Problem], str | None]  # why it cannot do this problem; None where it can
    run: Callable[[Problem], Tensor]  # [T, N], newly allocated on x's device, in problem.out_dtype


def choose(problem: Problem, providers: Sequence[Provider], name: str) -> Provider:
    """The provider called ``name``, or for ``"auto"`` the first that takes the problem, which is logged once.

    Raises:
        ConfigError: ``name`` is unknown, or that provider (for ``"auto"``: every one) refuses; the sentence says why.
    """
    names = ["auto", *(provider.name for provider in providers)]
    if name not in names:
        raise ConfigError(f"provider = {name!r} is not known; accepted are {', '.join(names)}")
    reasons = []
    for provider in providers:
        if name not in ("auto", provider.name):
            continue
        reason = provider.missing() or provider.refuses(problem)
        if reason is None:
            if name == "auto":
                _report(provider.name, str(problem))
            return provider
        reasons.append(f"provider {provider.name!r} {reason}")
    raise ConfigError(f"{problem} is not possible: {'; '.join(reasons)}")


@functools.lru_cache(maxsize=256)
def _report(name: str, problem: str) -> None:
    logger.info("provider 'auto' chose %r for %s", name, problem)
