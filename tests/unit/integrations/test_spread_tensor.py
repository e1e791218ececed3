"""What stands in a module for a spread weight: its metadata can be had, its bytes in no way that torch knows."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save

from vmm_dwdp.errors import StateError
from vmm_dwdp.integrations.spread_tensor import SpreadTensor

SENTENCE = "w13_weight of layer 3 is spread over the group and is here only between acquire and release of its layer"


@pytest.fixture
def spread() -> SpreadTensor:
    return SpreadTensor("w13_weight of layer 3", (8, 3, 4), (12, 1, 3), torch.bfloat16, torch.device("cpu"))


def test_one_made_in_inference_mode_is_no_inference_tensor() -> None:
    with torch.inference_mode():
        made = SpreadTensor("w2_weight of layer 3", (8, 3), (3, 1), torch.bfloat16, torch.device("cpu"))
        copied = made.data

    assert not made.is_inference()
    assert not copied.is_inference()


def test_what_needs_no_bytes_can_be_had(spread: SpreadTensor) -> None:
    for tensor in (spread, spread.data, spread.detach(), spread.data.data):
        assert isinstance(tensor, SpreadTensor)
        assert (tuple(tensor.shape), tensor.stride(), tensor.dtype) == ((8, 3, 4), (12, 1, 3), torch.bfloat16)
        assert (tensor.ndim, tensor.numel(), tensor.nbytes, tensor.element_size(), len(tensor)) == (3, 96, 192, 2, 8)
        assert isinstance(tensor, torch.nn.Parameter)
        assert (tensor.device, tensor.is_meta, tensor.requires_grad) == (torch.device("cpu"), True, False)
        assert "w13_weight of layer 3" in repr(tensor)


WANT_BYTES: dict[str, Callable[[torch.Tensor], Any]] = {
    "copied to the CPU": lambda w: w.cpu(),
    "copied to a GPU": lambda w: w.cuda(),
    "moved": lambda w: w.to("cpu", torch.float32),
    "cloned": lambda w: w.clone(),
    "copied deeply": copy.deepcopy,
    "pickled": pickle.dumps,
    "saved": lambda w: torch.save({"w": w}, io.BytesIO()),
    "saved as safetensors": lambda w: save({"w": w.detach()}),
    "as NumPy's": lambda w: w.numpy(),
    "taken by NumPy": np.asarray,
    "as a list": lambda w: w.tolist(),
    "taken as DLPack": torch.from_dlpack,
    "its address": lambda w: w.data_ptr(),
    "its storage": lambda w: w.untyped_storage(),
    "an expert": lambda w: w[0],
    "every expert": list,
    "viewed": lambda w: w.view(torch.uint8),
    "transposed": lambda w: w.transpose(1, 2),
    "in a sum": lambda w: torch.ones(8, 3, 4) + w,
    "in a product": lambda w: torch.ones(2, 8, 4, 3) @ w.data,
    "in a list of tensors": lambda w: torch._foreach_add([torch.ones(8, 3, 4), w], 1),
    "compared": lambda w: torch.equal(torch.ones(8, 3, 4), w),
    "copied from": lambda w: torch.ones(8, 3, 4).copy_(w),
    "written to": lambda w: w.copy_(torch.ones(8, 3, 4)),
    "written to through .data": lambda w: w.data.copy_(torch.ones(8, 3, 4)),
    "an expert written to": lambda w: w.__setitem__(0, 1),
    "given other bytes": lambda w: setattr(w, "data", torch.ones(8, 3, 4)),
    "filled": lambda w: w.fill_(0),
    "shared with another process": lambda w: w.share_memory_(),
    "an output": lambda w: torch.add(torch.ones(8, 3, 4), 1, out=w),
    "in a linear layer": lambda w: torch.nn.functional.linear(torch.ones(2, 4), w),
    "initialised": torch.nn.init.normal_,
    "one like it": torch.zeros_like,
    "as a number": float,
}


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("want", WANT_BYTES.values(), ids=WANT_BYTES.keys())
def test_whoever_wants_bytes_is_told_why_there_are_none(
    want: Callable[[torch.Tensor], Any], mode: Callable[[], Any], spread: Any
) -> None:
    with mode(), pytest.raises(StateError, match=SENTENCE):
        want(spread)


@pytest.mark.filterwarnings("ignore:for w13_weight. copying from a non-meta parameter")
def test_a_module_with_one_is_neither_moved_nor_loaded_nor_exported(spread: SpreadTensor) -> None:
    module = torch.nn.Module()
    module._parameters["w13_weight"] = spread

    with pytest.raises(StateError, match=SENTENCE):
        module.to(torch.float32)
    with pytest.raises(RuntimeError, match=SENTENCE):  # torch gathers what went wrong with each parameter
        module.load_state_dict({"w13_weight": torch.ones(8, 3, 4)})
    with pytest.raises(StateError, match=SENTENCE):
        torch.save(module.state_dict(), io.BytesIO())
    assert module.w13_weight is spread
