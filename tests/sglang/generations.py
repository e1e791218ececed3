"""What SGLang asks about the GPU, answered as by another; and configs of checkpoints: both decide the MoE runner."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import engine_process
import experts
import torch

CAPABILITIES = {"Ampere": (8, 0), "Hopper": (9, 0), "Blackwell": (10, 0), "consumer Blackwell": (12, 0)}

_QWEN3 = json.loads((engine_process.MODEL / "config.json").read_text())
_DEEPSEEK = {"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3"}
_FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic", "fmt": "e4m3"}
_NVFP4 = {"quant_method": "modelopt", "quant_algo": "NVFP4", "config_groups": {}, "ignore": []}
_MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
MODELS: dict[str, dict[str, Any]] = {
    "Qwen3 bf16": _QWEN3,
    "Qwen3 FP8": _QWEN3 | {"quantization_config": _FP8},
    "Qwen3 NVFP4": _QWEN3 | {"quantization_config": _NVFP4},
    "DeepSeek FP8": _DEEPSEEK | {"quantization_config": _FP8},
    "Kimi K2 Thinking": _DEEPSEEK | {"quantization_config": experts.INT4},
    "gpt-oss": {"architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "quantization_config": _MXFP4},
    "GLM-4 FP8": {
        "architectures": ["Glm4MoeForCausalLM"],
        "model_type": "glm4_moe",
        "quantization_config": _FP8,
    },
}


def write(folder: Path) -> dict[str, Path]:
    """A folder for each model, with nothing but its config."""
    for name, config in MODELS.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(config))
    return {name: folder / name for name in MODELS}


@contextmanager
def machine(capability: tuple[int, int]) -> Iterator[None]:
    """SGLang's questions for the GPU's generation are answered with ``capability``; that there is none stays true.

    SGLang remembers the answers, so they are given once and forgotten at the end. It knows MXFP4 only where it sees a
    GPU when it is imported, and triton_kernels come with its GPU packages.
    """
    from sglang.srt.layers import quantization
    from sglang.srt.layers.quantization.mxfp4 import Mxfp4Config
    from sglang.srt.utils import common

    named = {name: getattr(common, name) for name in dir(common) if name.startswith(("is_sm", "is_blackwell"))}
    questions = [question for question in named.values() if hasattr(question, "cache_clear")]
    assert len(questions) >= 5
    common.is_cuda.cache_clear()
    with (
        patch.object(torch.cuda, "is_available", lambda: True),
        patch.object(torch.cuda, "get_device_capability", lambda *_: capability),
        patch.object(torch.version, "cuda", "13.0"),
    ):
        for question in questions:
            question.cache_clear()
            question()
    common.is_cuda.cache_clear()
    methods = [quantization.QUANTIZATION_METHODS, quantization.BASE_QUANTIZATION_METHODS]
    try:
        with (
            patch.dict(methods[0], mxfp4=Mxfp4Config),
            patch.dict(methods[1], mxfp4=Mxfp4Config),
            patch.object(common, "is_triton_kernels_available", lambda: True),
        ):
            yield
    finally:
        for question in questions:
            question.cache_clear()
