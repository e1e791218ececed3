"""One MoE layer in torch, operation by operation as `roofline` counts them: what calibration and benchmarks time."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from vmm_dwdp.errors import ConfigError
from vmm_dwdp.planning.formats import WeightFormat
from vmm_dwdp.planning.models import ModelSpec
from vmm_dwdp.planning.roofline import Batch


def fill(shard: torch.Tensor, device: torch.device) -> None:
    """Random weights for a shard ``[n, ..., K]``, made on ``device``: for host memory, a CPU would take seconds."""
    for expert in shard:
        expert.copy_(torch.randn(expert.shape, dtype=shard.dtype, device=device).mul_(expert.shape[-1] ** -0.5))


class TorchLayer:
    """Random weights in bf16, and a fixed routing that sends every expert as many tokens as whole numbers allow.

    Args:
        batch: all of its requests have one length.

    Raises:
        ConfigError: a model whose weights are not bf16, or requests of different length.
    """

    def __init__(self, model: ModelSpec, batch: Batch, device: torch.device) -> None:
        if model.expert_format is not WeightFormat.BF16 or len(model.attention.projections) != 4:
            raise ConfigError(f"a torch layer has bf16 experts and grouped-query attention, which {model.name} has not")
        if len(set(batch.lengths)) > 1:
            raise ConfigError("a torch layer's requests all have one length")
        self._attention = model.attention
        self._batch = batch
        self._top_k = model.top_k
        tokens, routed = batch.tokens, batch.tokens * model.top_k

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(shape, dtype=torch.bfloat16, device=device).mul_(shape[-1] ** -0.5)

        self.hidden = random(tokens, model.hidden)
        self._norm = torch.ones(model.hidden, dtype=torch.bfloat16, device=device)
        self._projections = [random(rows, columns) for columns, rows in model.attention.projections]
        order = torch.randperm(routed, device=device)  # of the routed tokens, by expert
        self._token = order // model.top_k
        self._place = torch.argsort(order)
        ends = torch.arange(1, model.num_experts + 1, device=device) * routed // model.num_experts
        self._ends = ends.to(torch.int32)

    def norm(self, hidden: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(hidden + residual, self._norm.shape, self._norm)

    def project(self, hidden: torch.Tensor) -> list[torch.Tensor]:
        """Queries, keys and values, ``[tokens, heads * dim]``."""
        return [F.linear(hidden, weight) for weight in self._projections[:3]]

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        requests, length = len(self._batch.lengths), self._batch.lengths[0]

        def heads(values: torch.Tensor) -> torch.Tensor:
            return values.view(requests, length, -1, self._attention.key_dim).transpose(1, 2)

        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # cuDNN's spends seconds on each new shape
            out = F.scaled_dot_product_attention(
                heads(query), heads(key), heads(value), is_causal=True, enable_gqa=True
            )
        return out.transpose(1, 2).reshape(self._batch.tokens, -1)

    def output(self, attended: torch.Tensor) -> torch.Tensor:
        return F.linear(attended, self._projections[3])

    def gather(self, hidden: torch.Tensor) -> torch.Tensor:
        """``[routed, hidden]``: every token once for each of its experts, by expert."""
        return hidden[self._token]

    def product(self, routed: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """``routed [routed, K]`` times the expert's of ``weight [E, N, K]``: ``[routed, N]``."""
        return F.grouped_mm(routed, weight.transpose(1, 2), offs=self._ends)

    def activate(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=1)
        return F.silu(gate) * up

    def combine(self, outputs: torch.Tensor) -> torch.Tensor:
        """``[tokens, hidden]``: the sum over every token's experts."""
        return outputs[self._place].view(self._batch.tokens, self._top_k, -1).sum(1)

    def before(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Everything up to the experts: the residual and the routed tokens."""
        attended = self.output(self.attend(*self.project(self.norm(hidden, hidden))))
        return attended, self.gather(self.norm(attended, hidden))

    def experts(self, routed: torch.Tensor, weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return self.product(self.activate(self.product(routed, weights["w13"])), weights["w2"])
