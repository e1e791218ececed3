"""Which quantised checkpoints can be spread, and what transformers makes of their experts on this machine."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import torch
import transformers

from vmm_dwdp.errors import ConfigError

_METHODS: Final = ("fp8", "mxfp4", "compressed-tensors")


def require_known_methods(directory: Path, config: Mapping[str, Any]) -> None:
    """Raise `ConfigError` if ``config.json`` names a method that is not known here; sooner than transformers could."""
    for method in _methods(config):
        if method not in _METHODS:
            raise ConfigError(f"{directory} is quantised by {method}; supported here are {', '.join(_METHODS)}")


def loading_config(config: Mapping[str, Any]) -> Any:
    """How transformers is to load a checkpoint of ``config.json``, if not as it would by itself: ``None`` if so.

    compressed-tensors would decompress the model in its first pass, and for that move all that is in it. The experts,
    which are stacked, transformers dequantises while it loads in any case.
    """
    return transformers.CompressedTensorsConfig(dequantize=True) if "compressed-tensors" in _methods(config) else None


def _methods(config: Mapping[str, Any]) -> list[str]:
    """By which methods it, or the config of a part of the model in it, says that weights are quantised."""
    stated = config.get("quantization_config")
    parts = [value for key, value in config.items() if isinstance(value, Mapping) and key != "quantization_config"]
    own = [str(stated.get("quant_method", "no method"))] if isinstance(stated, Mapping) and stated else []
    return own + [method for part in parts for method in _methods(part)]


def require_spreadable(directory: Path, config: Mapping[str, Any], quantizer: Any, device: torch.device) -> None:
    """Raise `ConfigError` if transformers' ``quantizer``, or its lack, makes of experts what cannot be spread.

    Args:
        config: the ``config.json`` of ``directory``.
        quantizer: the ``HfQuantizer`` that has prepared the model, if any.
        device: where the model is run.
    """
    if quantizer is None:
        if _methods(config):
            raise ConfigError(f"{directory} is quantised in a part of config.json in which transformers does not look")
        return
    if not quantizer.pre_quantized:
        raise ConfigError(f"{directory} is not quantised, and what is spread cannot be quantised while it is loaded")
    if quantizer.quantization_config.dequantize:
        return
    accelerator = torch.accelerator.current_accelerator() or torch.device("cpu")
    if _method(quantizer) == "mxfp4" and device.type != accelerator.type:
        raise ConfigError(
            f"{directory} is in MXFP4, whose kernels transformers takes for {accelerator.type} here, not for "
            f"{device.type}: give that device, or quantization_config=Mxfp4Config(dequantize=True)"
        )
    if _method(quantizer) == "compressed-tensors":
        raise ConfigError(
            f"{directory} would be decompressed in its first pass, which moves experts: leave quantization_config out, "
            "or give CompressedTensorsConfig(dequantize=True)"
        )


def dequantised(directory: Path, quantizer: Any, dtypes: Iterable[torch.dtype]) -> str | None:
    """A sentence that the experts, which are of ``dtypes`` in the model, are dequantised, if they are."""
    found = sorted(str(dtype).removeprefix("torch.") for dtype in {*dtypes})
    if quantizer is None or any(dtype.itemsize == 1 for dtype in {*dtypes}):
        return None
    return (
        f"{directory}: experts in {_method(quantizer)} become {' and '.join(found)}, as transformers dequantises here"
    )


def _method(quantizer: Any) -> str:
    method = quantizer.quantization_config.quant_method
    return str(getattr(method, "value", method))
