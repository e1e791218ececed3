"""Shared experts of which a rank has a part are refused, whatever the model calls its other parts."""

from __future__ import annotations

import pytest
import torch

from vmm_dwdp import ConfigError
from vmm_dwdp.integrations.sglang import hooks
from vmm_dwdp.integrations.sglang.shared_experts import require_whole


class RowParallelLinear(torch.nn.Module):
    """As SGLang has it: the parts are added up by this layer, or by whoever is behind it."""

    def __init__(self, tp_size: int, *, reduce_results: bool) -> None:
        super().__init__()
        self.input_size, self.input_size_per_partition = 64, 64 // tp_size
        self.reduce_results = reduce_results


def model(shared: str, tp_size: int, *, reduce_results: bool = False) -> torch.nn.Module:
    block = torch.nn.ModuleDict({"o_proj": RowParallelLinear(2, reduce_results=False)})
    block[shared] = torch.nn.ModuleDict({"down_proj": RowParallelLinear(tp_size, reduce_results=reduce_results)})
    return torch.nn.ModuleDict({"mlp": block})


@pytest.mark.parametrize("name", ["shared_experts", "shared_expert"])
def test_a_part_of_a_shared_expert_is_refused_by_name(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"ModuleDict cuts mlp\.{name}\.down_proj over --tp-size"):
        require_whole(model(name, 2))


def test_whole_ones_and_those_whose_parts_are_added_are_not() -> None:
    require_whole(model("shared_experts", 1))
    require_whole(model("shared_experts", 2, reduce_results=True))
    require_whole(model("experts", 2))


def test_so_it_is_where_sglangs_own_dwdp_takes_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose shared experts would be fused if the plugin had not switched that off."""
    monkeypatch.setattr(hooks, "_left_to_sglang", True)
    with pytest.raises(ConfigError, match="its output would be wrong"):
        hooks.construct_model(lambda: model("shared_experts", 2))
    whole = model("shared_experts", 1)
    assert hooks.construct_model(lambda: whole) is whole
