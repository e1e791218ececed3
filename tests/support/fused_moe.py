"""Stands for a layer of SGLang, where there is no SGLang."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch


def moe_layer(method: str, runner: str, **attributes: Any) -> SimpleNamespace:
    """What says which weights and which MoE runner a layer of SGLang has."""
    quant_method = type(method, (), attributes)()
    return SimpleNamespace(
        quant_method=quant_method, runner=SimpleNamespace(runner_backend=SimpleNamespace(value=runner))
    )


def fused_moe(num_experts: int, num_loaded: int, **weights: torch.Tensor) -> Any:
    """What `ExpertLayer` reads of a `FusedMoE` in bf16, of which this rank has so many experts to load."""
    module: Any = torch.nn.Module()
    for name, tensor in weights.items():
        module.register_parameter(name, torch.nn.Parameter(tensor, requires_grad=False))
    counts = {"moe_ep_size": 1, "moe_ep_rank": 0, "num_local_experts": num_loaded}
    dispatcher = dict.fromkeys(("num_local_routed_experts", "local_expert_mapping", "expert_mask_gpu"))
    vars(module).update(
        layer_id=3,
        num_experts=num_experts,
        _num_local_routed=num_loaded,
        _dwdp_bound=False,
        **counts,
        dispatcher=SimpleNamespace(**counts, **dispatcher),
        moe_runner_config=SimpleNamespace(num_local_experts=num_loaded),
        **vars(moe_layer("UnquantizedFusedMoEMethod", "triton")),
    )
    return module


def weight(experts: int, rows: int = 64) -> torch.Tensor:
    """Of the experts of one rank; 128 bytes a row."""
    return torch.zeros(experts, rows, 64, dtype=torch.bfloat16)
