"""Where the regions that ``torch.compile`` makes of a model end."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch._C._dynamo.eval_frame as frames

Call = TypeVar("Call", bound=Callable[..., Any])


def between_regions(call: Call) -> Call:
    """``torch.compile`` ends a region before ``call``, runs it as it is, and begins another region after it.

    A compiler knows of no operation after which a tensor's bytes are others although nothing wrote to it: told that
    acquire and release write to the weights, inductor copies the weights, and moves both.

    `torch.compiler.disable` does it by a wrapper, which every call goes through, compiled or not: five calls of Python
    functions, where the launching thread has time for one or two. So ``call`` itself gets the marks that tell the
    compiler, if this torch knows them.
    """
    reason = "acquire and release stand between compiled regions, in program order"
    wrapper: Call = torch.compiler.disable(call, reason=reason)  # type: ignore[no-untyped-call]
    if not hasattr(frames, "set_code_exec_strategy"):
        return wrapper
    vars(call).update({name: mark for name, mark in vars(wrapper).items() if name.startswith("_torchdynamo_disable")})
    skip = frames._FrameAction.SKIP
    frames.set_code_exec_strategy(call.__code__, frames._FrameExecStrategy(skip, skip))  # it, and what it calls
    return call


@torch.compiler.disable(reason="a `with` block of a runtime is not compiled")  # type: ignore[untyped-decorator, no-untyped-call]
def warn_of_with(block: str, remedy: str) -> None:
    """Tell who compiles a function with a ``with`` ``block`` that this function stays as it is.

    A region can end at a call, and go on after it; within a ``with`` block of a class that it does not know,
    torch.compile gives the whole function up, and says so only in its own log.
    """
    warnings.warn(
        f"torch.compile does not compile a function in which a `with {block}` stands, only what that calls: {remedy}",
        stacklevel=4,  # who has called for the block
    )
