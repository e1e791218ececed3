"""Grouped GEMMs over expert weights: existing kernels on one tensor, and ours on a list of tensors."""

from typing import NamedTuple

from vmm_dwdp.kernels import contiguous, tensor_list
from vmm_dwdp.kernels.chosen import chosen_gemm
from vmm_dwdp.kernels.contiguous import grouped_gemm
from vmm_dwdp.kernels.formats import Format, Scales
from vmm_dwdp.kernels.tensor_list import tensor_list_grouped_gemm
from vmm_dwdp.kernels.warming import warm_up


class ProviderStatus(NamedTuple):
    """One way to do a grouped GEMM, as this machine sees it.

    Attributes:
        name: the function, a dot, and what its ``provider=`` takes.
        usable: here and now, by its name at least.
        reason: what it supports, or why it cannot be used here, or only by its name.
    """

    name: str
    usable: bool
    reason: str


def providers() -> list[ProviderStatus]:
    """Every provider, in the order ``provider="auto"`` tries them. Imports nothing heavy and never raises."""
    found = []
    for function, offered in (
        (grouped_gemm, contiguous.PROVIDERS),
        (tensor_list_grouped_gemm, tensor_list.PROVIDERS),
    ):
        for provider in offered:
            try:
                missing = provider.missing()
                untried = provider.untried() if missing is None and provider.untried else None
            except Exception as error:  # whatever a half-installed package does, the listing goes on
                missing, untried = f"cannot tell: {error}", None
            name = f"{function.__name__}.{provider.name}"
            found.append(ProviderStatus(name, missing is None, missing or untried or provider.supports))
    return found


__all__ = [
    "Format",
    "ProviderStatus",
    "Scales",
    "chosen_gemm",
    "grouped_gemm",
    "providers",
    "tensor_list_grouped_gemm",
    "warm_up",
]
