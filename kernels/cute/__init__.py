"""Kernels written in the CuTe DSL."""
