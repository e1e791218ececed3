"""What was compiled at installation."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Final

# Whether the C of this package was compiled at installation, for which there had to be a C compiler
HAS_NATIVE: Final = find_spec("vmm_dwdp.allocator._native") is not None
