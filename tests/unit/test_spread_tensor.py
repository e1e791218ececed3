"""Placeholders of spread parameters: they tell what they are, and one sentence to whoever wants their bytes."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save
from torch import Tensor, nn

from vmm_dwdp import StateError
from vmm_dwdp.integrations.spread_tensor import spread_placeholder

SENTENCE = "layers.3.experts.w is spread"


def placeholder() -> nn.Parameter:
    return spread_placeholder((4, 3, 2), torch.bfloat16, SENTENCE)


def test_it_tells_what_an_ordinary_parameter_on_the_meta_device_tells() -> None:
    found = placeholder()
    ordinary = nn.Parameter(torch.empty((4, 3, 2), dtype=torch.bfloat16, device="meta"), requires_grad=False)
    for tell in (
        lambda p: (p.shape, p.dtype, p.device, p.layout, p.is_meta, p.requires_grad, p.grad, p.is_leaf, p.nbytes),
        lambda p: (p.size(), p.size(1), p.dim(), p.ndim, p.numel(), p.element_size(), p.stride(), len(p)),
        lambda p: (p.is_floating_point(), p.is_complex(), p.is_contiguous(), isinstance(p, nn.Parameter)),
    ):
        assert tell(found) == tell(ordinary)
    assert SENTENCE in repr(found)
    assert f"{found}" == str(found) == repr(found)


def test_it_may_be_frozen_and_detached() -> None:
    found = placeholder()
    found.requires_grad_(False)
    found.requires_grad = False
    found.grad = None
    assert found.data is found
    assert found.detach() is found


READERS: dict[str, Callable[[Any], Any]] = {
    "to": lambda p: p.to("cpu"),
    "cpu": lambda p: p.cpu(),
    "half": lambda p: p.half(),
    "a row": lambda p: p[0],
    "iteration": list,
    "item": lambda p: p.sum().item(),
    "tolist": lambda p: p.tolist(),
    "numpy": lambda p: p.numpy(),
    "numpy's asarray": np.asarray,
    "dlpack": torch.from_dlpack,
    "a checksum": lambda p: p.view(torch.uint8).sum(),
    "storage": lambda p: p.untyped_storage(),
    "clone": lambda p: p.clone(),
    "deepcopy": copy.deepcopy,
    "pickle": pickle.dumps,
    "torch.save": lambda p: torch.save({"p": p}, io.BytesIO()),
    "safetensors": lambda p: save({"p": p}),
    "sum of two": lambda p: p + 1,
    "comparison": lambda p: p == p,
    "equal": lambda p: torch.equal(torch.zeros(4, 3, 2), p),
    "linear": lambda p: nn.functional.linear(torch.zeros(2, 2), p),
    "in a list": lambda p: torch.cat([torch.zeros(1), p]),
    "as a source": lambda p: torch.zeros(4, 3, 2).copy_(p),
    "as a destination": lambda p: p.copy_(torch.zeros(4, 3, 2)),
    "out": lambda p: torch.add(torch.zeros(4, 3, 2), 1, out=p),
    "an item": lambda p: p.__setitem__(0, 1.0),
    "data": lambda p: setattr(p, "data", torch.zeros(4, 3, 2)),
    "init": nn.init.normal_,
    "like it": torch.zeros_like,
    "float": float,
}


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("read", READERS.values(), ids=READERS.keys())
def test_whoever_wants_bytes_gets_the_sentence(read: Callable[[Any], Any], mode: Callable[[], Any]) -> None:
    with mode(), pytest.raises(StateError, match=SENTENCE):
        read(placeholder())


def test_one_made_in_inference_mode_is_no_inference_tensor() -> None:
    with torch.inference_mode():
        found: Tensor = placeholder()
    assert not found.is_inference()
