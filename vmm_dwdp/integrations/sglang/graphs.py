"""CUDA graphs of decoding with ``--dwdp-size``, where passes of few tokens read experts in place.

SGLang switches graphs off with ``--dwdp-size``. Its runner of decode graphs takes attention data parallel for ranks
that compute together, and chooses a graph by the longest batch of all; with DWDP nobody gathers how long they are. But
these compute by themselves, as some of its draft models do: for those it goes by the rank's own batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vmm_dwdp.config import DWDPConfig


def are_left_on(resolved: Any, config: DWDPConfig) -> bool:
    """Whether the engine is to have them: its arguments do not switch graphs off, and few tokens read in place."""
    return config.group_size > 1 and config.reads_in_place and not resolved.disable_cuda_graph


def is_local(original: Callable[[Any], bool], model_runner: Any) -> bool:
    """Around SGLang's question whether a forward pass is one rank's own, asked where decode graphs are captured."""
    from sglang.srt.runtime_context import get_parallel

    return int(get_parallel().dwdp_size) > 1 or original(model_runner)


def switch_off() -> None:
    """In the process of a rank, before they are captured."""
    from sglang.srt.model_executor.cuda_graph_config import Backend
    from sglang.srt.runtime_context import get_exec

    get_exec().graph.cuda_graph_config.decode.backend = Backend.DISABLED
