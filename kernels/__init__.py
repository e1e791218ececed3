"""Grouped GEMMs over expert weights: existing kernels on one tensor, and ours on a list of tensors."""

from vmm_dwdp.kernels.formats import Format, Scales
from vmm_dwdp.kernels.tensor_list import tensor_list_grouped_gemm

__all__ = ["Format", "Scales", "tensor_list_grouped_gemm"]
