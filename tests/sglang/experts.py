"""Real `FusedMoE` layers, filled through their own weight loader with bytes that depend on layer, expert and tensor."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock, patch

import torch

NUM_LAYERS, NUM_EXPERTS, TOP_K = 3, 8, 2
HIDDEN, INTERMEDIATE = 512, 384
AS_GPT_OSS = {"with_bias": True, "gemm1_alpha": 1.702, "gemm1_clamp_limit": 7.0}


def _compressed(form: str, weights: dict[str, Any], inputs: dict[str, Any] | None) -> dict[str, Any]:
    """A quantisation of compressed-tensors as a checkpoint's config states it."""
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    common = {"quant_method": "compressed-tensors", "ignore": ["lm_head"], "quantization_status": "compressed"}
    return common | {"format": form, "config_groups": {"group_0": group}}


_FP8 = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False}
INT4 = _compressed(
    "pack-quantized", {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}, None
)
_FP8_WEIGHTS: dict[str, dict[str, Any]] = {  # and how activations are scaled
    "tensor": {"inputs": "tensor"},
    "channel": {"inputs": "token"},
    "block": {"inputs": "token", "block_structure": [128, 128]},
}
COMPRESSED_FP8 = {
    f"fp8 {strategy} of compressed-tensors": _compressed(
        "float-quantized",
        _FP8 | {"strategy": strategy, "block_structure": stated.get("block_structure")},
        _FP8 | {"strategy": stated["inputs"], "dynamic": stated["inputs"] == "token"},
    )
    for strategy, stated in _FP8_WEIGHTS.items()
}


def quantisation(kind: str) -> Any:
    """SGLang's quantisation config of one of the supported kinds of weights."""
    if kind.startswith("bf16"):
        return None
    if kind == "fp8 tensor of ModelOpt":
        from sglang.srt.layers.quantization.modelopt_quant import ModelOptFp8Config

        return ModelOptFp8Config(is_checkpoint_fp8_serialized=True, exclude_modules=[])
    if kind in COMPRESSED_FP8:
        from sglang.srt.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig

        return CompressedTensorsConfig.from_config(COMPRESSED_FP8[kind])
    if kind.startswith("fp8"):
        from sglang.srt.layers.quantization.fp8 import Fp8Config

        if kind.startswith("fp8 block"):
            return Fp8Config(is_checkpoint_fp8_serialized=True, weight_block_size=[128, 128])
        return Fp8Config(is_checkpoint_fp8_serialized=True, activation_scheme="static")
    if kind.startswith("mxfp4"):
        from sglang.srt.layers.quantization.mxfp4 import Mxfp4Config

        return Mxfp4Config(is_checkpoint_mxfp4_serialized=True)
    if kind.startswith("nvfp4"):
        from sglang.srt.layers.quantization.modelopt_quant import ModelOptFp4Config

        return ModelOptFp4Config(is_checkpoint_nvfp4_serialized=True, group_size=16, exclude_modules=[])
    if kind.startswith("wna16"):
        from sglang.srt.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig

        return CompressedTensorsConfig.from_config(INT4)
    if kind == "awq":
        from sglang.srt.layers.quantization.awq.awq import AWQMarlinConfig

        stated = {"bits": 4, "group_size": 128, "zero_point": True, "quant_method": "awq"}
        return AWQMarlinConfig.from_config(stated)
    if kind.startswith("gptq"):
        from sglang.srt.layers.quantization.gptq.gptq import GPTQMarlinConfig

        stated = {"bits": 4, "group_size": 128, "sym": True, "desc_act": kind == "gptq in order of activation"}
        return GPTQMarlinConfig.from_config(stated)
    raise ValueError(kind)


def model(kind: str, num_experts: int = NUM_EXPERTS, top_k: int = TOP_K, *, scale: int = 1) -> torch.nn.Module:
    """A model of nothing but MoE layers, with experts ``scale`` times as wide both ways."""
    from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE

    made = torch.nn.Module()
    made.layers = torch.nn.ModuleList(
        FusedMoE(
            num_experts=num_experts,
            hidden_size=HIDDEN * scale,
            intermediate_size=INTERMEDIATE * scale,
            layer_id=number,
            top_k=top_k,
            quant_config=quantisation(kind),
            prefix=f"model.layers.{number}.mlp.experts",
            **(AS_GPT_OSS if kind.startswith("mxfp4") else {}),
        )
        for number in range(NUM_LAYERS)
    )
    return made


def load(made: torch.nn.Module) -> None:
    """Offer every expert to every layer's weight loader, as SGLang does on each rank once it has constructed a model;
    then post-process."""
    from vmm_dwdp.integrations.sglang import hooks

    hooks.construct_model(lambda: made)
    for layer in made.layers:
        for name, parameter in list(layer.named_parameters()):
            if not hasattr(parameter, "weight_loader"):
                continue
            if layer.quant_config is not None and layer.quant_config.get_name() == "mxfp4":
                _load_at_once(layer, name, parameter)
                continue
            for expert in range(layer.num_experts):
                for shard_id in ("w1", "w3") if name.startswith("w13") else ("w2",):
                    loaded = checkpoint_tensor(layer, name, parameter, expert, shard_id)
                    layer.weight_loader(parameter, loaded, f"experts.{name}", shard_id, expert)
        layer.quant_method.process_weights_after_loading(layer)


def _load_at_once(layer: Any, name: str, parameter: torch.Tensor) -> None:
    """As the model gpt-oss loads: a rank's experts in one call, which the model has cut out of the checkpoint."""
    first = layer.moe_ep_rank * layer.num_local_experts
    ours = range(first, first + layer.num_local_experts)
    loaded = torch.stack([checkpoint_tensor(layer, name, parameter, expert, "whole") for expert in ours])
    layer.weight_loader(parameter, loaded, f"experts.{name}", None, None)


def checkpoint_tensor(layer: Any, name: str, parameter: torch.Tensor, expert: int, shard_id: str) -> torch.Tensor:
    """What a checkpoint has for one expert's ``gate`` (w1), ``up`` (w3) or ``down`` (w2), or the ``whole`` of it."""
    shape = list(parameter.shape[1:])
    transposed = getattr(parameter, "is_transposed", False)
    if layer.quant_config is None and layer.use_triton_kernels:
        shape.reverse()  # that runner's are transposed as they are loaded
    if "g_idx" in name or "weight_shape" in name:
        pass  # the same for gate and up
    elif shard_id in ("w1", "w3") and transposed:
        shape[-1] //= 2
    elif shard_id in ("w1", "w3") and shape:
        shape = shape[1:] if len(shape) == 1 else [shape[0] // 2, *shape[1:]]
    if transposed and "zero" not in name and "compressed" in layer.quant_config.get_name():
        shape.reverse()  # its packed tensors are stored the other way round
    if "input_scale" in name and "compressed" in layer.quant_config.get_name():
        shard_id = "both"  # gate and up must have the same
    seed = hashlib.sha256(f"{layer.layer_id} {name} {expert} {shard_id}".encode()).digest()
    generator = torch.Generator(device="cpu").manual_seed(int.from_bytes(seed[:6], "little"))
    if "g_idx" in name:  # the group of each input: a kernel takes it for a place in the scales
        return (torch.randperm(shape[0], generator=generator, device="cpu") // 128).to(parameter.dtype)
    if "scale" in name and parameter.dtype == torch.uint8:  # of MXFP4, a power of two: from 2**-10 to 2**-7
        return torch.randint(117, 121, shape, generator=generator, dtype=torch.uint8, device="cpu")
    if not parameter.dtype.is_floating_point:
        of_all_values = torch.iinfo(parameter.dtype)
        return torch.randint(
            *(of_all_values.min, of_all_values.max, shape), generator=generator, dtype=parameter.dtype, device="cpu"
        )
    values = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu") * 0.1
    if "scale" in name:
        values = values.abs() + 0.01
        if parameter.dtype == torch.float16:  # of GPTQ, whose products are, too, and may not be more than 65,504
            values /= 4
    return values.to(parameter.dtype).to(parameter.device)


def tensors(layer: Any, names: list[str], *, optional: bool = False) -> list[torch.Tensor]:
    """The tensors that dotted names lead to: all of them, or those that the layer has."""
    from vmm_dwdp.integrations.sglang.expert_tensor import find

    found = [tensor for tensor in (find(layer, name) for name in names) if tensor is not None]
    assert optional or len(found) == len(names)
    return found


def digests(layer: Any, names: list[str]) -> dict[str, str]:
    """A digest of each named tensor's shape, strides, dtype and bytes."""
    found = {}
    for name, tensor in zip(names, tensors(layer, names), strict=True):
        raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8).cpu().numpy().tobytes()
        about = f"{tuple(tensor.shape)} {tensor.stride()} {tensor.dtype}"
        found[name] = f"{about} {hashlib.sha256(raw).hexdigest()}"
    return found


@contextmanager
def without_a_gpu() -> Iterator[None]:
    """Let layers be constructed and post-processed here that SGLang makes on a GPU only.

    NVFP4's constructor asks for Blackwell, and its scales are sent to the GPU. What FP8 with a scale per tensor, MXFP4
    and Marlin do in kernels is done by PyTorch, or stands for it: any function of one expert's bytes would do.
    """
    from sglang.srt.hardware_backend.gpu.quantization import awq_kernels, gptq_kernels
    from sglang.srt.layers.quantization import fp8, modelopt_quant, mxfp4
    from sglang.srt.layers.quantization.awq import awq
    from sglang.srt.layers.quantization.compressed_tensors.schemes import (
        compressed_tensors_w8a8_fp8_moe as w8a8_fp8,
    )
    from sglang.srt.layers.quantization.compressed_tensors.schemes import (
        compressed_tensors_wNa16_moe as wna16,
    )

    with ExitStack() as patches:
        if not torch.cuda.is_available():
            patches.enter_context(patch.object(torch.Tensor, "cuda", lambda tensor, *_: tensor))
        for module in (fp8, modelopt_quant, w8a8_fp8):
            patches.enter_context(patch.object(module, "scaled_fp8_quant", _scaled_fp8_quant))
        patches.enter_context(patch.object(mxfp4, "_swizzle_mxfp4", _swizzle))
        patches.enter_context(patch.object(gptq_kernels, "gptq_marlin_repack", _repack))
        patches.enter_context(patch.object(awq_kernels, "awq_marlin_moe_repack", _repack_all, create=True))
        patches.enter_context(patch.object(awq, "verify_marlin_supported", lambda *_, **__: None))
        patches.enter_context(patch.object(wna16, "marlin_make_workspace", lambda *_: torch.zeros(1)))
        patches.enter_context(patch.dict(sys.modules, _TRITON_KERNELS))
        if hasattr(modelopt_quant, "is_blackwell_supported"):  # 0.5.17
            patches.enter_context(patch.object(modelopt_quant, "is_blackwell_supported", lambda: True))
        else:
            from sglang.srt.runtime_context import override_platform

            patches.enter_context(override_platform(is_blackwell=True))
        yield


def _scaled_fp8_quant(values: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return (values.float() / scale).to(torch.float8_e4m3fn), scale


@dataclass(init=False)
class _Config:
    """Stands for triton_kernels' ``PrecisionConfig`` and ``FlexCtx``, which hold what they are given."""

    def __init__(self, **given: Any) -> None:
        vars(self).update(given)


_MATMUL = SimpleNamespace(PrecisionConfig=_Config, FlexCtx=_Config)
_TRITON_KERNELS = {
    "triton_kernels": Mock(),
    "triton_kernels.matmul": _MATMUL,
    "triton_kernels.matmul_ogs": _MATMUL,  # 0.5.17
}


def _repack(weight: torch.Tensor, perm: torch.Tensor, size_k: int, size_n: int, num_bits: int) -> torch.Tensor:
    """Stands for Marlin's order of one expert, ``[K / 8, N]`` packed: another shape, with other bytes."""
    return (weight ^ 0x5A5A5A5A).reshape(size_k // 16, size_n * num_bits // 2)


def _repack_all(weight: torch.Tensor, perm: torch.Tensor, size_k: int, size_n: int, num_bits: int) -> torch.Tensor:
    return torch.stack([_repack(expert, perm, size_k, size_n, num_bits) for expert in weight])


def _swizzle(weight: torch.Tensor, scale: torch.Tensor, num_warps: int) -> tuple[Any, None, Any]:
    """Stands for triton_kernels' layouts: tensors inside other objects, transposed, with other bytes."""

    def wrapped(tensor: torch.Tensor) -> Any:
        data = (tensor ^ 0x5A).transpose(-2, -1)
        return SimpleNamespace(storage=SimpleNamespace(data=data), shape=list(data.shape), shape_max=list(data.shape))

    return wrapped(weight), None, wrapped(scale)
