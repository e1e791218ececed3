"""Triton's kernels without a GPU: scripts in processes of their own, and a driver that has compiled for one.

Triton decides when a kernel is defined whether it is interpreted: so who interprets and who compiles are not in one
process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest


def python(script: str, *arguments: str, given: object = None, **environment: str) -> list[Any]:
    """Run ``script`` in a process of its own, with ``given`` as JSON to read; what it printed, a JSON value a line."""
    pytest.importorskip("triton")
    finished = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | environment,
        input=json.dumps(given),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert finished.returncode == 0, finished.stderr
    return [json.loads(line) for line in finished.stdout.splitlines()]


def compile_for(capability: int) -> None:
    """Let Triton in this process take a GPU of this compute capability, such as 90, for the one that it is on."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    class Driver:
        class utils:  # Triton's own name
            get_device_properties = staticmethod(lambda device: {"max_shared_mem": 232448})

        get_current_target = staticmethod(lambda: GPUTarget("cuda", capability, 32))
        get_current_device = staticmethod(lambda: 0)
        get_current_stream = staticmethod(lambda device=0: 0)
        get_device_capability = staticmethod(lambda device=0: divmod(capability, 10))

    driver.set_active(Driver())
