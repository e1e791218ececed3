"""A plugin for SGLang: the chunk of a running engine's prefill can be changed, as a start takes a minute.

SGLang reads its argument once, and for every batch what its scheduler made of it.
"""

from __future__ import annotations

from typing import Any


def register() -> None:
    """SGLang calls it once in every process."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register("sglang.srt.managers.scheduler.Scheduler.set_internal_state", _change, HookType.REPLACE)


def change(engine: Any, tokens: int) -> None:
    """Let each scheduler of ``engine`` take at most so many tokens of its prompts at a time from now on.

    The engine was started with as many or more, of which its memory was sized.
    """
    from sglang.srt.managers.io_struct import SetInternalStateReq

    wanted = SetInternalStateReq(server_args={"chunked_prefill_size": tokens})
    changed = engine.loop.run_until_complete(engine.tokenizer_manager.set_internal_state(wanted))
    if not changed or not all(changed):
        raise RuntimeError(f"SGLang's schedulers did not take chunks of {tokens} tokens: {changed}")


def _change(scheduler: Any, request: Any) -> Any:
    from sglang.srt.managers.io_struct import SetInternalStateReqOutput

    scheduler.chunked_prefill_size = request.server_args["chunked_prefill_size"]
    return SetInternalStateReqOutput(updated=True)
