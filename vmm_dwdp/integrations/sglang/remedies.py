"""What a user is told whose experts are not served: why, and what to type."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from vmm_dwdp.integrations.sglang.schemes import NotServedError
from vmm_dwdp.integrations.sglang.settings import CONFIG


def fallback(not_served: NotServedError) -> str:
    """With ``--dwdp-size``: SGLang's own DWDP runs."""
    sentence = f"{not_served}, so SGLang's own DWDP runs instead of vmm-dwdp"
    runners = _typed_with_dwdp_size(not_served)
    return f"{sentence}; vmm-dwdp can with {_typed(runners)}" if runners else sentence


def _typed_with_dwdp_size(not_served: NotServedError) -> list[str]:
    """SGLang refuses triton_kernel by name here. It comes with auto, where one that dequantises was named instead."""
    runners = [runner for runner in not_served.runners if runner != "triton_kernel"]
    dequantised = not_served.runner == "triton" and len(runners) < len(not_served.runners)
    return ["auto", *runners] if dequantised else runners


def refusal(not_served: NotServedError, server_args: Any) -> str:
    """Without it, where experts were to be in host memory: SGLang has other ways to have them there."""
    if not_served.runners:
        return f"{not_served}; it can with {_typed(not_served.runners)}"
    paged = " or --enable-paged-experts" if hasattr(server_args, "enable_paged_experts") else ""
    return f"{not_served}; start without {CONFIG}, and with SGLang's own --cpu-offload-gb{paged}"


def _typed(runners: Iterable[str]) -> str:
    return " or ".join(f"--moe-runner-backend {runner}" for runner in runners)
