"""Kernels written in the CuTe DSL. Only `launch` can be imported without it."""

MAX_EXPERTS = 512  # of one call: each CTA keeps their tiles in shared memory
