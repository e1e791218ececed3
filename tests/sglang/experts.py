"""Real `FusedMoE` layers, filled through their own weight loader with bytes that depend on layer, expert and tensor."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch

NUM_LAYERS, NUM_EXPERTS, TOP_K = 3, 8, 2
HIDDEN, INTERMEDIATE = 512, 384


def quantisation(kind: str) -> Any:
    """SGLang's quantisation config of one of the supported kinds of weights."""
    if kind == "bf16":
        return None
    if kind.startswith("fp8"):
        from sglang.srt.layers.quantization.fp8 import Fp8Config

        if kind == "fp8 block":
            return Fp8Config(is_checkpoint_fp8_serialized=True, weight_block_size=[128, 128])
        return Fp8Config(is_checkpoint_fp8_serialized=True, activation_scheme="static")
    if kind == "nvfp4":
        from sglang.srt.layers.quantization.modelopt_quant import ModelOptFp4Config

        return ModelOptFp4Config(is_checkpoint_nvfp4_serialized=True, group_size=16, exclude_modules=[])
    raise ValueError(kind)


def model(kind: str, num_experts: int = NUM_EXPERTS, top_k: int = TOP_K) -> torch.nn.Module:
    """A model of nothing but MoE layers."""
    from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE

    made = torch.nn.Module()
    made.layers = torch.nn.ModuleList(
        FusedMoE(
            num_experts=num_experts,
            hidden_size=HIDDEN,
            intermediate_size=INTERMEDIATE,
            layer_id=number,
            top_k=top_k,
            quant_config=quantisation(kind),
            prefix=f"model.layers.{number}.mlp.experts",
        )
        for number in range(NUM_LAYERS)
    )
    return made


def load(made: torch.nn.Module) -> None:
    """Offer every expert to every layer's weight loader, as SGLang does on each rank; then post-process."""
    for layer in made.layers:
        for name, parameter in list(layer.named_parameters()):
            if hasattr(parameter, "weight_loader"):
                for expert in range(layer.num_experts):
                    for shard_id in ("w1", "w3") if name.startswith("w13") else ("w2",):
                        loaded = checkpoint_tensor(layer, name, parameter, expert, shard_id)
                        layer.weight_loader(parameter, loaded, f"experts.{name}", shard_id, expert)
        layer.quant_method.process_weights_after_loading(layer)


def checkpoint_tensor(layer: Any, name: str, parameter: torch.Tensor, expert: int, shard_id: str) -> torch.Tensor:
    """What a checkpoint has for one expert's ``gate`` (w1), ``up`` (w3) or ``down`` (w2)."""
    shape = list(parameter.shape[1:])
    if shard_id != "w2" and shape:
        shape = shape[1:] if len(shape) == 1 else [shape[0] // 2, *shape[1:]]
    seed = hashlib.sha256(f"{layer.layer_id} {name} {expert} {shard_id}".encode()).digest()
    generator = torch.Generator(device="cpu").manual_seed(int.from_bytes(seed[:6], "little"))
    if parameter.dtype == torch.uint8:
        return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8, device="cpu")
    values = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu") * 0.1
    if "scale" in name:
        values = values.abs() + 0.01
    return values.to(parameter.dtype).to(parameter.device)


def digests(layer: Any, names: list[str]) -> dict[str, str]:
    """A digest of the bytes of each named tensor that the layer has."""
    found = {}
    for name in names:
        tensor = getattr(layer, name, None)
        if tensor is not None:
            raw = tensor.detach().contiguous().view(torch.uint8).cpu().numpy().tobytes()
            found[name] = f"{tuple(tensor.shape)} {tensor.dtype} {hashlib.sha256(raw).hexdigest()}"
    return found


@contextmanager
def without_a_gpu() -> Iterator[None]:
    """Let NVFP4's layers be constructed here: their constructor asks for Blackwell, and scales are sent to the GPU."""
    from sglang.srt.layers.quantization import modelopt_quant

    with ExitStack() as patches:
        if not torch.cuda.is_available():
            patches.enter_context(patch.object(torch.Tensor, "cuda", lambda tensor, *_: tensor))
        if hasattr(modelopt_quant, "is_blackwell_supported"):  # 0.5.17
            patches.enter_context(patch.object(modelopt_quant, "is_blackwell_supported", lambda: True))
        else:
            from sglang.srt.runtime_context import override_platform

            patches.enter_context(override_platform(is_blackwell=True))
        yield
