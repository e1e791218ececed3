"""The kernels that transformers takes for MXFP4, as a module of the same interface in torch's operations.

transformers gets the package gpt-oss-triton-kernels from a hub. What it uses of it is here: the tensors and their
layouts, the routing, and the product. The layout rearranges and pads as that for a Hopper GPU does, in another way.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.integrations import hub_kernels
from transformers.quantizers import quantizer_mxfp4

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # what the three bits beside the sign stand for
FP4 = "fp4"
TILE = 48  # rows of a weight; few weights have a multiple of it


class StridedLayout:
    """As the tensor is."""

    def __init__(self, shape: Any) -> None:
        self.initial_shape = shape

    def swizzle_data(self, data: Tensor) -> Tensor:
        return data

    def unswizzle_data(self, data: Tensor) -> Tensor:
        return data


class TiledLayout(StridedLayout):
    """``[E, K / 2, N]`` as tiles of 48 rows by 4 bytes, one after another: ``[E, K / 8, N' * 4]``, column by column."""

    def swizzle_data(self, data: Tensor) -> Tensor:
        rows = F.pad(data.mT, (0, 0, 0, -data.shape[-1] % TILE))  # [E, N', K / 2]
        tiles = rows.unflatten(2, (-1, 4)).unflatten(1, (-1, TILE)).transpose(2, 3)
        return tiles.permute(0, 1, 3, 4, 2).flatten(1, 3).mT

    def unswizzle_data(self, data: Tensor) -> Tensor:
        tiles = data.mT.unflatten(1, (-1, TILE, 4)).permute(0, 1, 4, 2, 3)
        rows = tiles.transpose(2, 3).flatten(3).flatten(1, 2)
        return rows[:, : self.initial_shape[-1]].mT


@dataclass
class Storage:
    data: Tensor
    layout: Any


@dataclass
class KernelTensor:
    storage: Storage
    dtype: Any
    shape: Any


def wrap_torch_tensor(data: Tensor, dtype: Any = None) -> KernelTensor:
    return KernelTensor(Storage(data, StridedLayout(data.shape)), dtype or data.dtype, list(data.shape))


def convert_layout(tensor: KernelTensor, layout_class: Any, **options: Any) -> KernelTensor:
    data = tensor.storage.layout.unswizzle_data(tensor.storage.data)
    layout = layout_class(data.shape, **options)
    return KernelTensor(Storage(layout.swizzle_data(data), layout), tensor.dtype, tensor.shape)


@dataclass
class FlexCtx:
    rhs_data: Any = None


@dataclass
class PrecisionConfig:
    weight_scale: Any = None
    flex_ctx: Any = field(default_factory=FlexCtx)


@dataclass
class FnSpecs:
    name: str
    fn: Any
    names: tuple[str, ...]


@dataclass
class FusedActivation:
    specs: FnSpecs
    arguments: tuple[Any, ...]
    reduction: int


@dataclass
class Indices:
    """Pairs of a token and an expert: ``[T * k]``, from their order by expert to that by token, and back."""

    src_indx: Tensor
    dst_indx: Tensor


@dataclass
class RoutingData:
    gate_scal: Tensor
    expt_hist: Tensor
    n_expts_tot: int
    n_expts_act: int
    expt_data: Any = None


def routing(logits: Tensor, top_k: int) -> tuple[RoutingData, Indices, Indices]:
    """Of ``logits`` ``[T, E]``."""
    best, experts = logits.topk(top_k, dim=-1)
    by_expert = experts.flatten().argsort(stable=True)
    by_token = by_expert.argsort()
    counts = (experts.flatten()[:, None] == torch.arange(logits.shape[1], device=logits.device)).sum(0)
    routed = RoutingData(best.softmax(-1).flatten()[by_expert], counts.int(), logits.shape[1], top_k)
    return routed, Indices(by_expert.int(), by_token.int()), Indices(by_token.int(), by_expert.int())


def swiglu(rows: Tensor, alpha: float, limit: float) -> Tensor:
    gate, up = rows[..., 0::2].clamp(max=limit), rows[..., 1::2].clamp(-limit, limit)
    return gate * torch.sigmoid(alpha * gate) * (up + 1)


def dequantised(weight: KernelTensor, scales: KernelTensor) -> Tensor:
    """``[E, K, N]`` in fp32."""
    packed = weight.storage.layout.unswizzle_data(weight.storage.data)
    nibbles = torch.stack([packed & 15, packed >> 4], dim=2).flatten(1, 2).long()
    values = torch.tensor([*E2M1, *(-value for value in E2M1)], device=packed.device)[nibbles]
    powers = scales.storage.layout.unswizzle_data(scales.storage.data).float() - 127
    return values * (2.0**powers).repeat_interleave(32, dim=1)


def matmul_ogs(
    x: Tensor,
    w: KernelTensor,
    bias: Tensor,
    routing_data: RoutingData,
    gather_indx: Indices | None = None,
    scatter_indx: Indices | None = None,
    precision_config: PrecisionConfig | None = None,
    gammas: Tensor | None = None,
    fused_activation: FusedActivation | None = None,
) -> Tensor:
    """Rows in the order of experts, each by its expert's weight; gathered from tokens before, or summed into them."""
    assert precision_config is not None
    rows = x if gather_indx is None else x[gather_indx.src_indx.long() // routing_data.n_expts_act]
    weights = dequantised(w, precision_config.weight_scale)
    assert weights.shape == tuple(w.shape), "the object's words are of the whole"
    parts = zip(rows.float().split(routing_data.expt_hist.tolist()), weights, bias, strict=True)
    out = torch.cat([part @ weight + row for part, weight, row in parts])
    if fused_activation is not None:
        out = fused_activation.specs.fn(out, *fused_activation.arguments)
    if gammas is not None:
        out = out * gammas[:, None]
    if scatter_indx is not None:
        out = out[scatter_indx.src_indx.long()].unflatten(0, (-1, routing_data.n_expts_act)).sum(1)
    return out.to(x.dtype)


KERNELS = SimpleNamespace(
    tensor=SimpleNamespace(FP4=FP4, convert_layout=convert_layout, wrap_torch_tensor=wrap_torch_tensor),
    tensor_details=SimpleNamespace(
        layout=SimpleNamespace(
            StridedLayout=StridedLayout, make_default_matmul_mxfp4_w_layout=lambda mx_axis: (TiledLayout, {})
        )
    ),
    matmul_ogs=SimpleNamespace(
        PrecisionConfig=PrecisionConfig,
        FlexCtx=FlexCtx,
        InFlexData=lambda: None,
        FnSpecs=FnSpecs,
        FusedActivation=FusedActivation,
        matmul_ogs=matmul_ogs,
    ),
    routing=SimpleNamespace(routing=routing),
    swiglu=SimpleNamespace(swiglu_fn=swiglu),
)


@contextlib.contextmanager
def keeping_mxfp4(kernels: Any = KERNELS) -> Iterator[None]:
    """transformers as it is where it has ``kernels``; on a CPU as by ``use_kernels``, with which it keeps MXFP4."""
    prepare = quantizer_mxfp4.Mxfp4HfQuantizer._process_model_before_weight_loading
    on_cpu = torch.accelerator.current_accelerator() is None

    def prepare_with_kernels(self: Any, model: Any, **kwargs: Any) -> Any:
        return prepare(self, model, **{**kwargs, "use_kernels": on_cpu})

    with pytest.MonkeyPatch.context() as patch:
        for package in ("kernels", "triton"):
            patch.setattr(quantizer_mxfp4, f"is_{package}_available", lambda *_: True)
        patch.setattr(hub_kernels, "get_kernel", lambda *_, **__: kernels)
        patch.setattr(quantizer_mxfp4.Mxfp4HfQuantizer, "_process_model_before_weight_loading", prepare_with_kernels)
        yield
