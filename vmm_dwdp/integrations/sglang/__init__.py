"""SGLang: this library's runtime in the place of SGLang's own DWDP, or for experts in host memory without it.

Installed with ``pip install vmm-dwdp[sglang]``, it is found by SGLang as a plugin and takes part where
``--dwdp-size N`` asks for DWDP or ``VMM_DWDP_CONFIG`` names a config; ``VMM_DWDP_DISABLE=1`` leaves SGLang's own.
"""

from vmm_dwdp.integrations.sglang.hooks import register

__all__ = ["register"]
