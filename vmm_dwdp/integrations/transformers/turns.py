"""Passes of several threads through one model, one after another.

[Note: Turns]
    The modules of a spread model show a layer's weights only while they run, and a runtime goes through its layers in
    one pass at a time. So a pass, from the beginning of the model's forward to its end, has the model to itself: other
    threads wait. `generate` in several threads interleaves their passes, each whole. A forward inside a forward (the
    model within the model, an encoder and its decoder, an experts module) belongs to the turn that runs.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable
from typing import Any, Final

import torch

from vmm_dwdp.errors import DWDPError, StateError
from vmm_dwdp.runtime import DWDPRuntime

_NOBODY: Final = -1  # no thread has this number

_run_as_it_is: Any = functools.partial(torch.compiler.disable, recursive=False)  # but compile what it calls


def is_captured(device: torch.device) -> bool:
    """Whether the current stream of ``device`` is captured into a graph."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


class Turns:
    """Takes care that the passes of ``runtime`` do not overlap, and that each begins where a pass begins.

    Args:
        num_layers: how many layers a whole pass has.

    Attributes:
        reached: how many layers the pass that runs has come to; the layers say so.
    """

    def __init__(self, runtime: DWDPRuntime, num_layers: int) -> None:
        self.reached = num_layers
        self._runtime = runtime
        self._num_layers = num_layers
        self._lock = threading.RLock()
        self._taken = False  # by the thread that holds the lock
        self._broken = False  # the last pass raised, and the runtime is not reset yet
        self._last = _NOBODY  # the thread of the last pass
        self._process = os.getpid()

    def taking(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """``forward`` in a turn of its own, or in that of the caller.

        If it raises, the next pass begins at its beginning. Where `torch.compile` meets it, what is inside is compiled,
        and the taking of turns is not.
        """

        @functools.wraps(forward)
        def in_turn(*args: Any, **kwargs: Any) -> Any:
            if os.getpid() != self._process:
                raise StateError("this process was forked from the one that spread the model, whose memory it shares")
            with self._lock:
                return forward(*args, **kwargs) if self._taken else self._take(forward, args, kwargs)

        uncompiled: Callable[..., Any] = _run_as_it_is(in_turn)
        return uncompiled

    @_run_as_it_is  # type: ignore[untyped-decorator]
    def _take(self, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        self._taken = True
        try:
            self._begin()
            try:
                output = forward(*args, **kwargs)
            except BaseException as failure:
                self._give_up(failure)
                raise
            self._broken = False
            return output
        finally:
            self._taken = False

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _begin(self) -> None:
        elsewhere = self.reached < self._num_layers and self._last != threading.get_ident()
        if self._broken or elsewhere:  # this pass is at its beginning, and the runtime in the middle of another
            self._runtime.reset()
        self._last = threading.get_ident()
        self._broken = True  # until it has ended well

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _give_up(self, failure: BaseException) -> None:
        try:
            self._runtime.reset()
        except DWDPError as error:  # as of any capture, which leaves the slots as they were: nothing is to be reset
            if not is_captured(self._runtime.device):
                failure.add_note(f"and then, while giving up the pass: {error}")
                return  # the next turn tries again
        self._broken, self.reached = False, self._num_layers
