"""What of a pass is C where that was compiled, and Python where it was not; the same names either way.

[Note: The hit path]
The launching thread comes to `acquire` and `release` from launching kernels, which drives whatever it ran before out of
its caches. A function of Python's takes it microseconds then, and the way of one `acquire` goes through many. So what
happens at nearly every layer of nearly every pass is one call of C: the layer lies ready in its slot or is on its way
there, the thread is in the middle of its pass, and nothing is traced or captured. It looks at all of this, waits
for the copies to be given to the driver if they are not yet, makes the driver calls, and changes the same few words
that the state machine of `vmm_dwdp.schedule.layer` keeps, which are C's for that: slots, layers and what they share.
The call is made without a function of Python's around it: from publish to close a runtime has C's `acquire` and
`release` in the place of its class's, which are called where C does not do it.

Where anything is unusual, the first layer of a pass included, C has changed nothing, and the state machine goes on. So
there is one account of what can happen, and it is in Python. Without a compiler every call goes through it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmm_dwdp.allocator.native import HAS_NATIVE

if HAS_NATIVE and not TYPE_CHECKING:
    from vmm_dwdp.allocator._native import HitPath, LayerState, PipelineState, SlotState, Turn, this_thread
else:
    from vmm_dwdp.schedule.hit_path_twin import HitPath, LayerState, PipelineState, SlotState, Turn, this_thread

__all__ = ["HitPath", "LayerState", "PipelineState", "SlotState", "Turn", "this_thread"]
