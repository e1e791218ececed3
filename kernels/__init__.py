"""Grouped GEMMs over expert weights: existing kernels on one tensor, and ours on a list of tensors."""
