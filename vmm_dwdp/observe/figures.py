"""Pictures without a display. matplotlib is needed only here, and only when a picture is asked for."""

from __future__ import annotations

from typing import Any

from vmm_dwdp.errors import ConfigError


def new_figure(width: float, height: float) -> Any:
    """A matplotlib figure of so many inches; raises `ConfigError` without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("drawing needs matplotlib: pip install 'vmm-dwdp[plot]'") from error
    return Figure(figsize=(width, height), layout="constrained")
