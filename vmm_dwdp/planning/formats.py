"""How the weights of linear layers are stored: which tensors, which arithmetic."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Any

import torch

from vmm_dwdp.errors import ConfigError
from vmm_dwdp.layout.weight_spec import WeightSpec


class WeightFormat(enum.Enum):
    """A storage format of weight matrices ``[N, K]``.

    Its block sizes: the FP8 of DeepSeek-V3 has an f32 scale for 128 x 128 values; NVFP4 an FP8 scale for 16 values;
    MXFP4 (Open Compute Project, "Microscaling Formats") an E8M0 scale for 32 values.
    """

    BF16 = "bf16"
    FP8_BLOCK = "fp8"
    NVFP4 = "nvfp4"
    MXFP4 = "mxfp4"

    @property
    def arithmetic(self) -> str:
        """Which of a GPU's peak rates a matrix product in this format can reach: ``bf16``, ``fp8`` or ``fp4``."""
        return {"bf16": "bf16", "fp8": "fp8", "nvfp4": "fp4", "mxfp4": "fp4"}[self.value]

    @property
    def activation_bytes(self) -> float:
        """Bytes of one value of the product's other operand, with its scales in blocks along K."""
        per_value = {"bf16": 2.0, "fp8": 1 + 4 / 128, "nvfp4": 0.5 + 1 / 16, "mxfp4": 0.5 + 1 / 32}
        return per_value[self.value]

    def weights(self, name: str, experts: int, rows: int, columns: int) -> dict[str, WeightSpec]:
        """The tensors that store ``experts`` matrices ``[rows, columns]``, by name."""
        if self is WeightFormat.BF16:
            return {name: WeightSpec((experts, rows, columns), torch.bfloat16)}
        if self is WeightFormat.FP8_BLOCK:
            scales = WeightSpec((experts, -(-rows // 128), -(-columns // 128)), torch.float32)
            return {name: WeightSpec((experts, rows, columns), torch.float8_e4m3fn), f"{name}_scale": scales}
        block = 16 if self is WeightFormat.NVFP4 else 32
        scales = WeightSpec((experts, rows, -(-columns // block)), torch.uint8)
        return {name: WeightSpec((experts, rows, -(-columns // 2)), torch.uint8), f"{name}_scale": scales}

    def nbytes(self, rows: int, columns: int) -> int:
        """Bytes of one stored matrix."""
        return sum(spec.expert_nbytes for spec in self.weights("w", 1, rows, columns).values())


def expert_format(quantization: Mapping[str, Any] | None) -> WeightFormat:
    """The format of the experts that a Hugging Face ``quantization_config`` states; ``None`` is bf16.

    Raises:
        ConfigError: a quantisation that is not one of `WeightFormat`.
    """
    if not quantization:
        return WeightFormat.BF16
    method, algorithm = quantization.get("quant_method"), str(quantization.get("quant_algo", ""))
    if method == "fp8" and quantization.get("weight_block_size") == [128, 128]:
        return WeightFormat.FP8_BLOCK
    if method == "mxfp4":
        return WeightFormat.MXFP4
    if method == "modelopt" and algorithm.upper() == "NVFP4":
        return WeightFormat.NVFP4
    known = "fp8 in blocks of 128 x 128, mxfp4, and modelopt with NVFP4"
    raise ConfigError(f"the quantization_config {dict(quantization)} is not one that is known here: {known}")


def attention_format(experts: WeightFormat) -> WeightFormat:
    """Of the attention of a checkpoint whose experts are stored so: those with FP4 experts keep it in bf16 (their
    ``modules_to_not_convert``, ``exclude_modules``)."""
    return experts if experts is WeightFormat.FP8_BLOCK else WeightFormat.BF16
