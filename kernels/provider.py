"""What a grouped GEMM can be done with, and choosing among that.

[Note: Asked once]
    Whether a provider can run on a machine, and whether it takes a problem, depends on nothing but the machine and the
    `signature` of the arguments. So the answer for a signature and a name is remembered, and a call with arguments of
    a signature seen before looks it up. What depends on the moment is asked at every call: what the offsets hold, and
    ``refuses_now``. That no provider takes a problem is not remembered: who is told so does not go on.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import logging
import threading
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vmm_dwdp.errors import ConfigError
from vmm_dwdp.kernels.formats import Format, Scales
from vmm_dwdp.kernels.problem import Problem, accepted, check, signature

logger = logging.getLogger("vmm_dwdp.kernels")

MAX_REMEMBERED = 4096  # answers; a model has one for each shape of its weights


class Provider(NamedTuple):
    """A kernel somebody offers. It is imported when it is first chosen."""

    name: str  # what `provider=` takes
    supports: str  # architectures, dtypes and alignment, in words
    missing: Callable[[], str | None]  # why it cannot run on the current device at all; None where it can
    refuses: Callable[[Problem], str | None]  # why it never does this problem, by its signature; None where it does
    run: Callable[[Problem], Tensor]  # [T, N], newly allocated on x's device, in problem.out_dtype
    imports: str | None = None  # the module that `run` imports
    refuses_now: Callable[[Problem], str | None] | None = None  # why it cannot do it at this moment
    untried: Callable[[], str | None] | None = None  # why "auto" passes it over on the current device


class Providers(tuple[Provider, ...]):
    """The providers of one function, in the order ``"auto"`` tries them, for any thread (see [Note: Asked once])."""

    def __init__(self, _providers: Iterable[Provider]) -> None:
        self._chosen: dict[Hashable, tuple[Format, Provider]] = {}
        self._lock = threading.Lock()  # of whoever finds out: once, and with one line in the log

    def multiply(
        self, x: Tensor, weights: Sequence[Tensor], offsets: Tensor, scales: Scales | None, name: str
    ) -> Tensor:
        """The grouped GEMM by the provider called ``name``; arguments, result and errors as of `check` and `choose`."""
        key = (name, signature(x, weights, offsets, scales))
        chosen = self._chosen.get(key)
        if chosen is None:
            problem = check(x, weights, offsets, scales)
            provider = self._find_out(key, problem, name)
        else:
            form, provider = chosen
            problem = accepted(x, weights, offsets, scales, form)
        if provider.refuses_now is not None and provider.refuses_now(problem) is not None:
            provider = choose(problem, self, name)
        return provider.run(problem)

    def _find_out(self, key: Hashable, problem: Problem, name: str) -> Provider:
        with self._lock:
            chosen = self._chosen.get(key)  # by another thread, while this one waited
            if chosen is not None:
                return chosen[1]
            provider = _first(problem, self, name, now=False)
            if len(self._chosen) >= MAX_REMEMBERED:
                self._chosen.clear()
            self._chosen[key] = problem.form, provider
            return provider


def choose(problem: Problem, providers: Sequence[Provider], name: str) -> Provider:
    """The provider called ``name``, or for ``"auto"`` the first that takes the problem, which is logged once.

    Raises:
        ConfigError: ``name`` is unknown, or that provider (for ``"auto"``: every one) refuses; the sentence says why.
    """
    return _first(problem, providers, name, now=True)


def _first(problem: Problem, providers: Sequence[Provider], name: str, *, now: bool) -> Provider:
    """See `choose`; what depends on the moment is left out unless ``now``."""
    names = ["auto", *(provider.name for provider in providers)]
    if name not in names:
        raise ConfigError(f"provider = {name!r} is not known; accepted are {', '.join(names)}")
    reasons = []
    x = problem.x
    with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
        for provider in providers:
            if name not in ("auto", provider.name):
                continue
            untried = provider.untried() if provider.untried else None
            reason = (
                provider.missing()
                or (untried if name == "auto" else None)
                or provider.refuses(problem)
                or (provider.refuses_now(problem) if now and provider.refuses_now else None)
                or (import_failure(provider.imports) if provider.imports else None)
            )
            if reason is None:
                _report(provider.name, name, str(problem), untried)
                return provider
            reasons.append(f"provider {provider.name!r} {reason}")
    raise ConfigError(f"{problem} is not possible: {'; '.join(reasons)}")


@functools.lru_cache(maxsize=256)
def _report(chosen: str, name: str, problem: str, untried: str | None) -> None:
    if name == "auto":
        logger.info("provider 'auto' chose %r for %s", chosen, problem)
    if untried is not None:
        _warn(chosen, untried)


@functools.cache
def _warn(name: str, untried: str) -> None:
    logger.warning("provider %r %s", name, untried)


@functools.cache
def not_installed(module: str, package: str) -> str | None:
    """Why a provider that needs ``module`` of ``package`` is missing; None where it is installed. Imports nothing."""
    if importlib.util.find_spec(module) is None:
        return f"needs the package {package}, which is not installed"
    return None


_importing = threading.Lock()


def import_failure(module: str) -> str | None:
    """Why ``module`` cannot be imported; None where it can. Tried once: half of it may stay behind where it failed."""
    with _importing:
        return _import_failure(module)


@functools.cache
def _import_failure(module: str) -> str | None:
    try:
        importlib.import_module(module)
    except Exception as error:  # built for another torch, for example: a loader's error of any kind
        return f"cannot be imported: {error}"
    return None


def is_capturing(device: torch.device) -> bool:
    """Whether the current stream of ``device`` is being captured into a CUDA graph."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()
