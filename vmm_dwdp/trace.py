"""What a rank did and when: public names, by the module that users have them from."""

from vmm_dwdp.observe.trace import Span, Trace, plot_traces, write_traces

__all__ = ["Span", "Trace", "plot_traces", "write_traces"]
