"""Which tensors of a `FusedMoE` layer its kernels read, for every quantisation method and MoE runner that is supported.

An explicit table: nothing is concluded from a tensor's shape, and what is not in the table is not spread. The
names were read in SGLang's source; they are dotted where a tensor lives on the quantisation method, and have a bar
between what versions call differently, the latest first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from vmm_dwdp.errors import ConfigError
from vmm_dwdp.integrations.sglang.rows import TELLINGS, Telling


class NotServedError(ConfigError):
    """A layer's experts cannot be spread, which is known as soon as it is constructed.

    Attributes:
        runner: of MoE, with which they cannot.
        runners: with which the same weights can.
    """

    def __init__(self, why: str, runner: str, runners: tuple[str, ...] = ()) -> None:
        super().__init__(why)
        self.runner = runner
        self.runners = runners


@dataclass(frozen=True)
class Scheme:
    """The per-expert tensors of one layer.

    Attributes:
        tensors: what a forward pass reads, experts first, in the order in which it reads them.
        optional: those of ``tensors`` that only some models have, such as biases.
        kept: the loader writes the final bytes of ``tensors``: what post-processing changes, it changes in place. Then
            they are loaded straight into the shard. Otherwise post-processing makes them, layer by layer.
        scratch: per-expert tensors that post-processing reads and a forward pass does not; freed after it.
        maximum: one number for all experts, which post-processing took as the maximum over the experts it saw.
    """

    tensors: tuple[str, ...]
    optional: frozenset[str] = frozenset()
    kept: bool = False
    scratch: tuple[str, ...] = ()
    maximum: tuple[str, ...] = ()


_BIASES = frozenset({"w13_weight_bias", "w2_weight_bias"})

_UNQUANTIZED = Scheme(("w13_weight", "w13_weight_bias", "w2_weight", "w2_weight_bias"), optional=_BIASES, kept=True)

_FP8_BLOCK = Scheme(
    ("w13_weight", "w13_weight_scale_inv", "w13_weight_bias", "w2_weight", "w2_weight_scale_inv", "w2_weight_bias"),
    optional=_BIASES,
    kept=True,
)

_FP8_SCALE = Scheme(
    ("w13_weight", "w13_weight_scale", "w13_weight_bias", "w2_weight", "w2_weight_scale", "w2_weight_bias"),
    optional=_BIASES,
    kept=True,
    maximum=("w13_input_scale", "w2_input_scale"),
)

_FP8_TENSOR = replace(_FP8_SCALE, kept=False)  # gate and up are quantised anew by one scale, where the scales are

_MXFP4_MARLIN = Scheme(
    ("w13_weight", "w13_weight_scale", "w13_weight_bias", "w2_weight", "w2_weight_scale", "w2_weight_bias"),
    optional=_BIASES,
)

_MXFP4_TRITON = Scheme(
    (
        "quant_method.w13_weight_triton_tensor.storage.data",
        "quant_method.w13_precision_config.b_mx_scale|weight_scale.storage.data",
        "w13_weight_bias",
        "quant_method.w2_weight_triton_tensor.storage.data",
        "quant_method.w2_precision_config.b_mx_scale|weight_scale.storage.data",
        "w2_weight_bias",
    ),
    scratch=("w13_weight_scale", "w2_weight_scale"),
)

_NVFP4_MARLIN = Scheme(
    (
        "w13_weight",
        "w13_weight_scale",
        "w13_weight_scale_2",
        "w2_weight",
        "w2_weight_scale",
        "w2_weight_scale_2",
    ),
    scratch=("w13_blockscale_swizzled", "w2_blockscale_swizzled"),
)

_NVFP4_CUTLASS = Scheme(
    (
        "w13_weight",
        "w13_blockscale_swizzled",
        "g1_alphas",
        "g1_alphas_up",
        "w2_weight",
        "w2_blockscale_swizzled",
        "g2_alphas",
    ),
    optional=frozenset({"g1_alphas_up"}),
    scratch=("w13_weight_scale", "w2_weight_scale", "w13_weight_scale_2", "w2_weight_scale_2"),
)

_NVFP4_TRTLLM = Scheme(
    (
        "w13_weight",
        "w13_weight_scale",
        "g1_scale_c",
        "g1_alphas",
        "g1_alphas_up",
        "gemm1_alpha",
        "gemm1_beta",
        "gemm1_clamp_limit",
        "w2_weight",
        "w2_weight_scale",
        "g2_alphas",
    ),
    optional=frozenset({"g1_alphas_up", "gemm1_alpha", "gemm1_beta", "gemm1_clamp_limit"}),
    scratch=("w13_blockscale_swizzled", "w2_blockscale_swizzled", "w13_weight_scale_2", "w2_weight_scale_2"),
)

_WNA16_MARLIN = Scheme(
    (
        "w13_weight_packed",
        "w13_weight_scale",
        "w13_weight_zero_point",
        "w13_weight_g_idx",
        "w13_g_idx_sort_indices",
        "w2_weight_packed",
        "w2_weight_scale",
        "w2_weight_zero_point",
        "w2_weight_g_idx",
        "w2_g_idx_sort_indices",
    ),
    optional=frozenset({"w13_weight_zero_point", "w2_weight_zero_point"}),
    scratch=("w13_weight_shape", "w2_weight_shape"),
)

_WNA16_TRITON = Scheme(
    ("w13_weight_packed", "w13_weight_scale", "w2_weight_packed", "w2_weight_scale"),
    scratch=(
        *("w13_weight_shape", "w13_weight_zero_point", "w13_weight_g_idx", "w13_g_idx_sort_indices"),
        *("w2_weight_shape", "w2_weight_zero_point", "w2_weight_g_idx", "w2_g_idx_sort_indices"),
    ),
)

_AWQ_MARLIN = Scheme(
    (
        *("w13_qweight", "w13_scales", "w13_qzeros", "w13_g_idx_sort_indices"),
        *("w2_qweight", "w2_scales", "w2_qzeros", "w2_g_idx_sort_indices"),
    )
)

_GPTQ_MARLIN = Scheme(
    (
        *("w13_qweight", "w13_scales", "w13_g_idx", "w13_g_idx_sort_indices"),
        *("w2_qweight", "w2_scales", "w2_g_idx", "w2_g_idx_sort_indices"),
    ),
    scratch=("w13_qzeros", "w2_qzeros"),
)

_SCHEMES: dict[tuple[str, str], Scheme] = {
    ("bf16", "triton"): _UNQUANTIZED,
    ("bf16", "triton_kernel"): _UNQUANTIZED,
    ("fp8 block", "triton"): _FP8_BLOCK,
    ("fp8 block", "deep_gemm"): _FP8_BLOCK,
    ("fp8 tensor", "triton"): _FP8_TENSOR,
    ("fp8 channel", "triton"): _FP8_SCALE,
    ("compressed fp8 block", "triton"): _FP8_SCALE,
    ("mxfp4", "marlin"): _MXFP4_MARLIN,
    ("mxfp4", "triton_kernel"): _MXFP4_TRITON,
    ("nvfp4", "marlin"): _NVFP4_MARLIN,
    ("nvfp4", "flashinfer_cutlass"): _NVFP4_CUTLASS,
    ("nvfp4", "flashinfer_trtllm"): _NVFP4_TRTLLM,
    ("wna16", "marlin"): _WNA16_MARLIN,
    ("wna16", "triton"): _WNA16_TRITON,
    ("awq", "marlin"): _AWQ_MARLIN,
    ("gptq", "marlin"): _GPTQ_MARLIN,
}
_RAN_ON_A_GPU = frozenset(  # a forward pass, bit-identical; of AWQ most of nine, as SGLang's own stray
    {
        *(("bf16", "triton"), ("bf16", "triton_kernel")),
        *(
            ("fp8 block", "triton"),
            ("fp8 block", "deep_gemm"),
            ("fp8 tensor", "triton"),
            ("fp8 channel", "triton"),
            ("compressed fp8 block", "triton"),
        ),
        *(("mxfp4", "triton_kernel"), ("mxfp4", "marlin"), ("nvfp4", "marlin")),
        *(("wna16", "marlin"), ("wna16", "triton"), ("awq", "marlin"), ("gptq", "marlin")),
    }
)


def _fp8_kind(method: Any) -> str | None:
    if method.use_mxfp8 or method.is_fp4_expert or not method.quant_config.is_checkpoint_fp8_serialized:
        return None
    return "fp8 block" if method.block_quant else "fp8 tensor"


def _modelopt_fp8_kind(method: Any) -> str | None:
    return "fp8 tensor" if method.quant_config.is_checkpoint_fp8_serialized else None


def _compressed_fp8_kind(scheme: Any) -> str | None:
    strategy = scheme.weight_quant.strategy
    return {"tensor": "fp8 tensor", "channel": "fp8 channel", "block": "compressed fp8 block"}.get(
        str(getattr(strategy, "value", strategy))
    )


def _nvfp4_kind(method: Any) -> str | None:
    return "nvfp4" if method.quant_config.is_checkpoint_nvfp4_serialized else None


_KINDS: dict[str, Callable[[Any], str | None]] = {
    "UnquantizedFusedMoEMethod": lambda method: "bf16",
    "Fp8MoEMethod": _fp8_kind,
    "Mxfp4MoEMethod": lambda method: "mxfp4",
    "ModelOptFp8MoEMethod": _modelopt_fp8_kind,
    "ModelOptNvFp4FusedMoEMethod": _nvfp4_kind,
    "CompressedTensorsW8A8Fp8MoE": _compressed_fp8_kind,
    "CompressedTensorsWNA16MoE": lambda scheme: "wna16",
    "CompressedTensorsWNA16TritonMoE": lambda scheme: "wna16",
    "CompressedTensorsMxInt4MoE": lambda scheme: "wna16",
    "AWQMoEScheme": lambda scheme: "awq",
    "GPTQMarlinMoEScheme": lambda scheme: "gptq",
}


# What the experts of a checkpoint may be, by SGLang's name of its quantisation: bf16 too, where that can leave them as
# they were. A name that is not here says nothing.
_KINDS_OF_CHECKPOINTS: dict[str | None, tuple[str, ...]] = {
    None: ("bf16",),
    "fp8": ("fp8 block", "fp8 tensor", "bf16"),
    "mxfp4": ("mxfp4",),
    "modelopt_fp4": ("nvfp4", "bf16"),
    "modelopt_fp8": ("fp8 tensor", "bf16"),
}


def supported() -> list[tuple[str, str]]:
    """Every (weights, MoE runner) in the table."""
    return list(_SCHEMES)


def scheme_of(layer: Any) -> Scheme:
    """The scheme of a `FusedMoE` layer.

    Raises:
        NotServedError: its quantisation method with its MoE runner is not in the table; the sentence names both.
    """
    method, kind, runner = _row_of(layer)
    if kind is not None and (kind, runner) in _SCHEMES:
        return _SCHEMES[kind, runner]
    variant = f" ({kind})" if kind else ""
    why = f"DWDP cannot spread experts of {method}{variant} with the MoE runner {runner}"
    raise NotServedError(why, runner, _runners_of(kind))


def telling_of(layer: Any) -> Telling | None:
    """How the kernels of a `FusedMoE` layer that is in the table are told rows of a bank; ``None`` if a bank does not
    serve it: they cannot be, or post-processing makes smaller scales than were loaded."""
    _, kind, runner = _row_of(layer)
    return None if kind == "fp8 tensor" else TELLINGS.get(runner)


def without_rows(layer: Any) -> str:
    """A sentence about a `FusedMoE` layer that is in the table, and that a bank does not serve."""
    _, kind, runner = _row_of(layer)
    return f"experts are read in place without a bank: {kind} with the MoE runner {runner} is told no rows"


def caution(layer: Any) -> str | None:
    """A sentence about a `FusedMoE` layer that is in the table, if no GPU has run such a layer's forward pass yet."""
    _, kind, runner = _row_of(layer)
    if (kind, runner) in _RAN_ON_A_GPU:
        return None
    return f"{kind} experts with the MoE runner {runner}: spread, but no GPU has run their forward pass in our tests"


def _row_of(layer: Any) -> tuple[str, str | None, str]:
    """The name of what defines the weights, which kind they are if it is known, and the MoE runner."""
    method = getattr(layer, "scheme", None) or layer.quant_method  # some methods leave all to a scheme of the layer
    name = type(method).__name__
    return name, _KINDS[name](method) if name in _KINDS else None, runner_of(layer)


def runner_of(layer: Any) -> str:
    """SGLang's name of the MoE runner that a `FusedMoE` layer came to, or ``none``."""
    method, scheme = layer.quant_method, getattr(layer, "scheme", None)
    if hasattr(method, "get_moe_runner_backend"):  # 0.5.23: what runs, which may not be the runner that is held
        backend = method.get_moe_runner_backend(layer)
    else:
        holders = (layer, scheme, getattr(scheme, "kernel", None))
        runners = (getattr(holder, "runner", None) for holder in holders)
        backend = next((runner.runner_backend for runner in runners if runner is not None), None)
        if type(method).__name__ == "ModelOptFp8MoEMethod":  # 0.5.17: holds another
            from sglang.srt.layers.moe.utils import get_moe_runner_backend

            backend = get_moe_runner_backend() if get_moe_runner_backend().is_flashinfer_trtllm() else backend
    name = "none" if backend is None else str(backend.value)
    return f"{name} with UE8M0 scales" if name == "deep_gemm" and _deep_gemm_repacks_scales() else name


def _deep_gemm_repacks_scales() -> bool:
    """Whether post-processing gives block scales another layout, as it does on Blackwell."""
    from sglang.srt.layers import deep_gemm_wrapper

    return bool(deep_gemm_wrapper.DEEPGEMM_SCALE_UE8M0)


def require_served(quantization: str | None, runner: str) -> None:
    """Foretell what `scheme_of` will say of a checkpoint, as far as the final arguments decide it.

    Args:
        quantization: SGLang's name for how the checkpoint is quantised, ``None`` if it is not.
        runner: of MoE, by the same names; "auto" becomes another in each layer's constructor.

    Raises:
        NotServedError: no experts that such a checkpoint can have are in the table with this runner.
    """
    kinds = _KINDS_OF_CHECKPOINTS.get(quantization)
    if runner == "auto" or kinds is None or any((kind, runner) in _SCHEMES for kind in kinds):
        return
    weights = "bf16" if quantization is None else quantization
    why = f"DWDP cannot spread {weights} experts with the MoE runner {runner}"
    raise NotServedError(why, runner, _runners_of(kinds[0]))


def _runners_of(kind: str | None) -> tuple[str, ...]:
    """What to name to a user: not deep_gemm, which is served on some GPUs only, and never the only one."""
    return tuple(runner for each, runner in _SCHEMES if each == kind and runner != "deep_gemm")
