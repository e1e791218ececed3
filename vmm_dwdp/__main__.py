"""``python -m vmm_dwdp``, where the command ``vmm-dwdp`` is not installed."""

import sys

from vmm_dwdp.cli import main

sys.exit(main())
