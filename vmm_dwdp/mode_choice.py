"""What mode auto goes by: public names, by the module that users have them from."""

from vmm_dwdp.observe.stats import ModeChoice

__all__ = ["ModeChoice"]
