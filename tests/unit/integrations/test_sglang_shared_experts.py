"""What a rank's tokens go through beside the experts is refused where it has a part of it."""

from __future__ import annotations

import pytest
import torch

from vmm_dwdp import ConfigError
from vmm_dwdp.integrations.sglang import hooks
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
    with pytest.raises(ConfigError, match="its output would be wrong"):
        hooks.construct_model(lambda: model(shared=2))
    whole = model()
    assert hooks.construct_model(lambda: whole) is whole
