"""Which experts modules can be told rows of a bank in the place of experts, and give the same bits.

[Note: Rows for experts]
    transformers' experts functions take ``num_experts`` to count rows of the weights, and the router's choice to name
    them; each gives a token's results in the order of its choice, so nothing of it depends on how rows are numbered.
    The eager loop adds them in the order of experts: by rows it would round otherwise.
"""

from __future__ import annotations

from typing import Any, Final

from vmm_dwdp.errors import ConfigError

IMPLEMENTATIONS: Final = ("batched_mm", "grouped_mm")


def require_reads_rows(path: str, module: Any, *, in_kernels: bool) -> None:
    """Raise `ConfigError` unless an experts module, as it is set now, can read rows; see [Note: Rows for experts].

    Args:
        path: its name in the model.
        in_kernels: whether its weights are in a layout of kernels; see [Note: Kernel layouts].
    """
    if in_kernels:
        raise ConfigError(
            f"{path} is in a layout of its kernels, which are told all experts at once, so the config must not "
            "have expert_bank: use resident_cache"
        )
    if not hasattr(module, "is_transposed"):
        raise ConfigError(
            f"{path} does not follow transformers' interface of experts, by which rows of a bank are told, so "
            "the config must not have expert_bank: use resident_cache"
        )
    implementation = module.config._experts_implementation
    if implementation not in IMPLEMENTATIONS:
        raise ConfigError(
            f"{path} runs by the experts implementation {implementation!r}, which would add in another order "
            f"by rows of a bank: call set_experts_implementation with {' or '.join(map(repr, IMPLEMENTATIONS))}, or "
            "leave expert_bank out of the config"
        )
