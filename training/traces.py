"""The file that keeps which experts each token chose.

A trace is an .npz file of four arrays: ``prefill`` and ``decode``, unsigned integers ``[sequences, tokens, layers,
top_k]``, numbers of experts; ``kinds``, the kind of text of each sequence; ``facts``, JSON about the model.
``vmm_dwdp/planning/routing.py`` reads it.
"""

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np


def save_trace(path: Path, phases: dict[str, np.ndarray], kinds: list[str], facts: dict[str, Any]) -> None:
    """Writes what ``record`` in ``recorder.py`` gives, and what else is known of the model.

    By LZMA, a sixth smaller than by numpy's own way.
    """
    arrays = {"kinds": np.array(kinds), "facts": np.array(json.dumps(facts)), **phases}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asarray(array, order="C"), allow_pickle=False)
