"""Acquire and release as operators of torch: what a compiler keeps in its place, and engines name as splitting ops.

[Note: Operators]
Where `torch.compile` meets `DWDPRuntime.acquire`, it ends a region, and begins another. A model that has to be one
graph (``fullgraph=True``, vLLM, SGLang's piecewise graphs) calls operators instead:

    number = operators.number(runtime)                   # once, after publish

    torch.ops.vmm_dwdp.acquire(x, number, layer)         # x: what the experts read
    y = experts(x)                                       # with the tensors that acquire always returns
    torch.ops.vmm_dwdp.release(y, number, layer)         # y: what they return

Each says of its tensor that it writes to it. It does not; but so what reads ``x`` afterwards comes after the acquire,
what made ``y`` before the release, and what reads ``y`` after that, whatever a compiler moves. Weights are seen as
tensors that nobody writes to, as ever.

Engines that cut a graph at operators, to capture what is between them, are told ``vmm_dwdp::acquire`` and
``vmm_dwdp::release``; inductor's own CUDA graphs end there by a tag. So neither is ever captured in the middle of a
pass; a pass that is captured whole calls the runtime.
"""

from __future__ import annotations

import itertools
from typing import Final
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from torch import library

from vmm_dwdp.errors import StateError
from vmm_dwdp.runtime import DWDPRuntime

_numbers: Final[WeakKeyDictionary[DWDPRuntime, int]] = WeakKeyDictionary()
_runtimes: Final[WeakValueDictionary[int, DWDPRuntime]] = WeakValueDictionary()
_next: Final = itertools.count()


def number(runtime: DWDPRuntime) -> int:
    """By which the operators know ``runtime`` in this process: a constant for a compiler, the same on every call.

    The first runtime to ask has 0, so that what is compiled may be kept for the next process. It keeps nothing alive.
    """
    if runtime not in _numbers:
        _numbers[runtime] = next(_next)
        _runtimes[_numbers[runtime]] = runtime
    return _numbers[runtime]


def _runtime(number: int) -> DWDPRuntime:
    runtime = _runtimes.get(number)
    if runtime is None:
        raise StateError(f"no runtime of this process has the number {number}: ask operators.number(runtime)")
    return runtime


def _acquire(x: torch.Tensor, runtime: int, layer: int) -> None:
    _runtime(runtime).acquire(layer)


def _release(x: torch.Tensor, runtime: int, layer: int) -> None:
    _runtime(runtime).release(layer)


def _nothing(x: torch.Tensor, runtime: int, layer: int) -> None:
    """What it is to a compiler, which has no bytes."""


_operators: Final = library.Library("vmm_dwdp", "DEF")  # type: ignore[no-untyped-call]
# Not in inductor's own CUDA graphs. A torch that does not know the tag captures none around operators that it does not.
_tags: Final = [tag for tag in (getattr(torch.Tag, "cudagraph_unsafe", None),) if tag is not None]
for _name, _call in ("acquire", _acquire), ("release", _release):
    _operators.define(f"{_name}(Tensor(a!) x, int runtime, int layer) -> ()", tags=_tags)  # type: ignore[no-untyped-call]
    _operators.impl(_name, _call, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    library.register_fake(f"vmm_dwdp::{_name}", _nothing, lib=_operators)
