"""Lets SGLang find a module of this folder as an installed plugin."""

from __future__ import annotations

import sys
from pathlib import Path


def add(folder: Path, module: str) -> None:
    """For this process and those that it starts. SGLang calls ``register`` of ``module`` once in each of them.

    Args:
        folder: where what is written for that lies as long as these processes run.
    """
    about = folder / f"{module}-0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module.replace('_', '-')}\nVersion: 0\n")
    (about / "entry_points.txt").write_text(f"[sglang.srt.plugins]\n{module} = {module}:register\n")
    sys.path.append(str(folder))
