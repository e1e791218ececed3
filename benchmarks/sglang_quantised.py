"""Experts of random weights in the formats that checkpoints of Qwen3-MoE come in, by the names that SGLang reads.

Integers are random, and their scales such that a product has the size of its input.
"""

from __future__ import annotations

from typing import Any

import torch

BLOCK = 128  # rows and columns of FP8 that share a scale
LARGEST = 448.0  # number of float8_e4m3fn
AWQ_GROUP, WNA16_GROUP = 128, 32  # inputs that share a scale
SPREAD = 4.61  # the standard deviation of random numbers of four bits

Tensors = dict[str, torch.Tensor]

_NOT_CONVERTED = ["self_attn", "mlp.gate", "lm_head"]
_INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": WNA16_GROUP}
CONFIGS: dict[str, dict[str, Any]] = {
    "bf16": {},
    "fp8": {
        "quant_method": "fp8",
        "weight_block_size": [BLOCK, BLOCK],
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
    },
    "awq": {
        "quant_method": "awq",
        "bits": 4,
        "group_size": AWQ_GROUP,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": _NOT_CONVERTED,
    },
    "wna16": {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["re:.*self_attn.*", "re:.*mlp.gate$", "lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": _INT4, "input_activations": None}},
    },
}
"""``quantization_config`` of a checkpoint, by the name of its weights."""


def experts(weights: str, count: int, rows: int, columns: int, device: torch.device) -> Tensors:
    """One projection of ``count`` experts, first; rows are outputs and columns inputs, multiples of 128."""
    if weights == "awq":
        return _awq(count, rows, columns, device)
    if weights == "wna16":
        return _wna16(count, rows, columns, device)
    return matrices(weights, count, rows, columns, device)


def matrices(weights: str, count: int, rows: int, columns: int, device: torch.device) -> Tensors:
    """``count`` matrices of what is not an expert: integers are of experts only."""
    made = torch.randn(count, rows, columns, device=device).div_(columns**0.5)
    return in_blocks(made) if weights == "fp8" else {"weight": made.to(torch.bfloat16)}


def in_blocks(weights: torch.Tensor) -> Tensors:
    """``[N, rows, columns]`` in FP8, and ``[N, rows / 128, columns / 128]`` what each block is to be multiplied by.

    Rows and columns are multiples of 128.
    """
    count, rows, columns = weights.shape
    blocks = weights.float().view(count, rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
    scales = blocks.abs().amax((2, 4), keepdim=True) / LARGEST
    quantised = (blocks / scales).view(weights.shape).to(torch.float8_e4m3fn)
    return {"weight": quantised, "weight_scale_inv": scales.squeeze(4).squeeze(2)}


def _awq(count: int, rows: int, columns: int, device: torch.device) -> Tensors:
    """Eight outputs in an integer; every zero point is 8."""
    groups = columns // AWQ_GROUP
    return {
        "qweight": _integers((count, columns, rows // 8), device),
        "qzeros": torch.full((count, groups, rows // 8), -0x77777778, dtype=torch.int32, device=device),  # 0x88888888
        "scales": _scales((count, groups, rows), columns, device),
    }


def _wna16(count: int, rows: int, columns: int, device: torch.device) -> Tensors:
    """Eight inputs in an integer, of which 8 is zero."""
    return {
        "weight_packed": _integers((count, rows, columns // 8), device),
        "weight_scale": _scales((count, rows, columns // WNA16_GROUP), columns, device),
        "weight_shape": torch.tensor([rows, columns], device=device).expand(count, 2).contiguous(),
    }


def _integers(shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    return torch.randint(-(2**31), 2**31, shape, dtype=torch.int32, device=device)


def _scales(shape: tuple[int, ...], inputs: int, device: torch.device) -> torch.Tensor:
    size = 1 / SPREAD / inputs**0.5
    return torch.empty(shape, device=device).uniform_(0.5 * size, 1.5 * size).to(torch.bfloat16)
