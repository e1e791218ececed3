"""One MoE layer as a rank sees it: its weights, their layouts, and what is copied for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from vmm_dwdp.config import DWDPConfig
from vmm_dwdp.errors import ConfigError
from vmm_dwdp.layout import RangeLayout
from vmm_dwdp.placement import ExpertPlacement
from vmm_dwdp.plan import LayerPlan, plan_layer
from vmm_dwdp.weight_spec import WeightSpec


@dataclass(frozen=True)
class Layer:
    """What is known of a layer before any memory is taken.

    Attributes:
        number: the model's own number of the layer.
        placement: the same for all of the layer's weights.
        layouts: by the name of the weight, in the order in which they are copied.
    """

    number: int
    weights: Mapping[str, WeightSpec]
    placement: ExpertPlacement
    layouts: Mapping[str, RangeLayout]
    plan: LayerPlan


def describe_layer(
    number: int, weights: Mapping[str, WeightSpec], config: DWDPConfig, rank: int, granularity: int
) -> Layer:
    """Work out placement, layouts and plan of rank ``rank``; raises `ConfigError` if the weights do not agree."""
    counts = {name: spec.num_experts for name, spec in weights.items()}
    if not counts:
        raise ConfigError(f"layer {number} has no weights")
    if len(set(counts.values())) > 1:
        stated = ", ".join(f"{name} has {count}" for name, count in counts.items())
        raise ConfigError(f"the weights of layer {number} disagree on the number of experts: {stated}")
    placement = ExpertPlacement(next(iter(counts.values())), config)
    layouts = {name: RangeLayout(placement, spec.expert_nbytes, granularity) for name, spec in weights.items()}
    slice_bytes = None if config.slice_bytes == "auto" else config.slice_bytes
    return Layer(number, dict(weights), placement, layouts, plan_layer(layouts, rank, slice_bytes))
