"""What a rank's tokens go through beside the experts is whole, and is refused where a rank has a part of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vmm_dwdp import ConfigError
from vmm_dwdp.integrations.sglang import hooks, shared_experts
from vmm_dwdp.integrations.sglang.shared_experts import require_whole


class RowParallelLinear(torch.nn.Module):
    """As SGLang has it."""

    def __init__(self, tp_size: int) -> None:
        super().__init__()
        self.input_size, self.input_size_per_partition = 64, 64 // tp_size


class FusedMoE(torch.nn.Module):
    _dwdp_bound = False


def model(*, shared: int = 1, attention: int = 1, vision: int = 1, experts: bool = True) -> torch.nn.Module:
    """Over so many ranks each part is cut."""
    mlp = {"shared_experts": torch.nn.ModuleDict({"down_proj": RowParallelLinear(shared)})}
    layer = {
        "mlp": torch.nn.ModuleDict(mlp),
        "self_attn": torch.nn.ModuleDict({"o_proj": RowParallelLinear(attention)}),
    }
    if experts:
        layer["mlp"]["experts"] = FusedMoE()
    decoder = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([torch.nn.ModuleDict(layer)])})
    encoder = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([RowParallelLinear(vision)])})
    return torch.nn.ModuleDict({"model": decoder, "visual": encoder})


@pytest.mark.parametrize(
    ("cut", "named"),
    [
        ({"shared": 2}, "model.layers.0.mlp.shared_experts.down_proj"),
        ({"attention": 2}, "model.layers.0.self_attn.o_proj"),
    ],
)
def test_a_part_is_refused_by_name(cut: dict[str, int], named: str) -> None:
    with pytest.raises(ConfigError, match=rf"ModuleDict cuts {named} over --tp-size, but with --dwdp-size"):
        require_whole(model(**cut))


def test_whole_ones_and_what_stands_beside_no_experts_are_not() -> None:
    require_whole(model())
    require_whole(model(vision=2))
    require_whole(model(shared=2, experts=False))


def test_so_it_is_where_sglangs_own_dwdp_takes_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose shared experts would be fused if the plugin had not switched that off."""
    monkeypatch.setattr(hooks, "_left_to_sglang", True)
    monkeypatch.setattr(hooks, "hook_model", lambda: None)
    with pytest.raises(ConfigError, match="its output would be wrong"):
        hooks.construct_model(lambda: model(shared=2))
    whole = model()
    assert hooks.construct_model(lambda: whole) is whole


def constructor_of_17(
    module: dict[str, Any], size: int, *, prefix: str = "", tp_rank: int = 1, tp_size: int = 2
) -> None:
    module |= {"size": size, "prefix": prefix, "part": (tp_rank, tp_size)}


def constructor_of_23(module: dict[str, Any], size: int, *, prefix: str = "", parallel_group: str = "tp") -> None:
    module |= {"size": size, "prefix": prefix, "part": parallel_group}


@pytest.mark.parametrize(
    ("constructor", "cut", "whole"), [(constructor_of_17, (1, 2), (0, 1)), (constructor_of_23, "tp", "replicated")]
)
def test_a_shared_expert_is_constructed_whole_and_nothing_else(
    constructor: Any, cut: Any, whole: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def part(prefix: str, *, with_dwdp: bool) -> Any:
        monkeypatch.setattr(shared_experts, "_each_has_its_tokens", lambda: with_dwdp)
        module: dict[str, Any] = {}
        shared_experts.construct_linear(constructor, module, 64, prefix=prefix)
        assert (module["size"], module["prefix"]) == (64, prefix)
        return module["part"]

    for name in "model.layers.1.mlp.shared_experts.down_proj", "model.layers.1.mlp.shared_expert.gate_up_proj":
        assert part(name, with_dwdp=True) == whole
        assert part(name, with_dwdp=False) == cut
    assert part("model.layers.0.mlp.down_proj", with_dwdp=True) == cut
    assert part("", with_dwdp=True) == cut


def test_a_sum_over_ranks_is_refused_where_each_has_its_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_experts, "_each_has_its_tokens", lambda: False)
    assert shared_experts.sum_over_ranks(torch.neg, torch.ones(1)) == -1
    monkeypatch.setattr(shared_experts, "_each_has_its_tokens", lambda: True)
    with pytest.raises(ConfigError, match="adds up over --tp-size"):
        shared_experts.sum_over_ranks(torch.neg, torch.ones(1))
