"""Whether it pays: a group that prefetches experts against the same GPUs under expert parallelism."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from vmm_dwdp.config import DWDPConfig
from vmm_dwdp.errors import ConfigError
from vmm_dwdp.layout.copies import LayerPlan
from vmm_dwdp.layout.layer import describe_layer
from vmm_dwdp.layout.placement import HOST
from vmm_dwdp.planning.contention import reached_by_all, reached_share
from vmm_dwdp.planning.gpus import GpuSpec
from vmm_dwdp.planning.memory import RankMemory, rank_memory
from vmm_dwdp.planning.models import ModelSpec
from vmm_dwdp.planning.nodes import ONE_NODE, Nodes
from vmm_dwdp.planning.pulling import AS_THE_RUNTIME, Turns
from vmm_dwdp.planning.roofline import Batch, Operation, dense_layer_operations, total
from vmm_dwdp.planning.simulator import LayerWork
from vmm_dwdp.planning.work import average_operations, layer_work, link_rates

SEARCHED_TOKENS = 1 << 20  # the longest forward pass for which `pays_from` looks


@dataclass(frozen=True)
class Estimate:
    """One group, with forward passes of ``batch`` on every rank. Times in seconds.

    Attributes:
        config: of the group; the expert-parallel group that it is compared with has as many ranks, or with several
            nodes all of theirs.
        imbalance: by how much the slowest rank's compute exceeds the mean, for which expert parallelism waits, and so
            does a rail of several nodes.
        turns: how owners are chosen as copies go, where the config has them chosen.
        nodes: over which the experts are spread; the group is one node's.
    """

    model: ModelSpec
    gpu: GpuSpec
    config: DWDPConfig
    batch: Batch
    imbalance: float = 0.0
    turns: Turns = AS_THE_RUNTIME
    nodes: Nodes = ONE_NODE

    def __post_init__(self) -> None:
        if self.config.group_size > self.gpu.max_group:
            raise ConfigError(
                f"a group of {self.config.group_size} is not possible: at most {self.gpu.max_group} {self.gpu.name} "
                "can read each other's memory"
            )

    @cached_property
    def plan(self) -> LayerPlan:
        """What the rank that fetches most copies for a layer."""
        size = self.config.group_size
        # In an even spread all ranks fetch alike but for their edges; the two ends and the middle show the extremes.
        ranks = sorted({0, size // 2, size - 1})
        weights = self.share.expert_weights
        plans = [describe_layer(0, weights, self.config, rank, self.gpu.granularity).plan for rank in ranks]
        return max(plans, key=lambda plan: plan.fetched_bytes)

    @cached_property
    def share(self) -> ModelSpec:
        """The model with the experts that are spread over this group."""
        return self.nodes.share(self.model)

    @property
    def world_size(self) -> int:
        """The ranks of all nodes."""
        return self.nodes.count * self.config.group_size

    @property
    def one_group_bytes(self) -> int:
        """What a layer's fetch would be, were all ranks of all nodes one group, with exactly as many experts each."""
        layer = self.model.layer_expert_bytes
        return layer - layer // self.world_size

    @cached_property
    def prefetch_seconds(self) -> float:
        """One layer's copies with nobody else on the links."""
        return copy_seconds(self.plan, self.gpu)

    @cached_property
    def copying_seconds(self) -> float:
        """One layer's copies while all other ranks copy theirs."""
        return copy_seconds(self.plan, self.gpu, self.reached_share)

    @cached_property
    def contended_share(self) -> float:
        """Of the links, what copies reach if all ranks copy all the time."""
        return reached_by_all(self.plan, self.config, self.turns, link_rates(self.gpu))

    @cached_property
    def reached_share(self) -> float:
        """Of the links, what copies reach while they run, as other ranks copy for as much of the time."""

        def period(share: float) -> float:
            copying = copy_seconds(self.plan, self.gpu, share)
            return steady_period(self.work, copying, self.config.prefetch_depth, share)

        return reached_share(self.prefetch_seconds, self.contended_share, period) if self.plan.streams else 1.0

    @cached_property
    def work(self) -> LayerWork:
        """A mean MoE layer's compute, with what the copies cost it."""
        return layer_work(self.operations, self.gpu, from_host=self.config.host_experts > 0)

    @cached_property
    def operations(self) -> list[Operation]:
        """A mean MoE layer's, with the exchanges between nodes; ranks of a rail wait for the slowest."""
        held = None if self.nodes.count == 1 else self.share.num_experts
        own = average_operations(self.model, self.gpu, self.batch, experts=held)
        if self.nodes.count > 1:
            own = [dataclasses.replace(each, seconds=each.seconds * (1 + self.imbalance)) for each in own]
        summed, sent = self.nodes.exchanges(self.model, self.batch.tokens)
        return [*summed, *own[:-1], *sent, own[-1]]

    @cached_property
    def layer_seconds(self) -> float:
        """From one MoE layer to the next, once the pass is under way."""
        return steady_period(self.work, self.copying_seconds, self.config.prefetch_depth, self.reached_share)

    @property
    def exposed_seconds(self) -> float:
        """Of `layer_seconds`, the part in which compute waits for copies."""
        return self.layer_seconds - disturbed_seconds(self.work, self.copying_seconds, self.reached_share)

    @cached_property
    def dense_seconds(self) -> float:
        """Of a pass, the layers without experts. The LM head, of one token a request, is left out."""
        dense = self.model.num_layers - len(self.model.moe_layers)
        return total(dense_layer_operations(self.model, self.gpu, self.batch)) * dense

    @cached_property
    def dwdp_seconds(self) -> float:
        """A forward pass of this group."""
        layers, depth = len(self.model.moe_layers), self.config.prefetch_depth
        wrap = 0.0
        if layers % min(depth, layers):  # the first layer's slot is read until the end of the pass before
            before = sum(phase.seconds for phase in self.work.before)
            wrap = max(0.0, self.copying_seconds - before - self.dense_seconds - self.exposed_seconds)
        return layers * self.layer_seconds + self.dense_seconds + wrap

    @cached_property
    def expert_parallel_seconds(self) -> float:
        """A forward pass under expert parallelism with data-parallel attention: tokens travel, weights do not."""
        size, tokens = self.world_size, self.batch.tokens
        held = max(1, self.model.num_experts // size)
        compute = total(average_operations(self.model, self.gpu, self.batch, experts=held))
        exchange = self.nodes.expert_parallel_exchange(self.model, self.gpu, tokens, self.config.group_size)
        layer = compute * (1 + self.imbalance) + exchange
        return len(self.model.moe_layers) * layer + self.dense_seconds

    @property
    def speedup(self) -> float:
        """Throughput of this group over that of expert parallelism on the same GPUs."""
        return self.expert_parallel_seconds / self.dwdp_seconds

    @cached_property
    def memory(self) -> RankMemory:
        own = rank_memory(self.share, self.gpu, self.config, self.batch.tokens)
        return dataclasses.replace(own, replicated=self.model.replicated_bytes)  # routers know all experts

    def require_fit(self) -> None:
        """Raise `ConfigError` if the model does not fit, with what is missing and what would fit."""
        if self.memory.left >= 0:
            return
        gib = 1 << 30
        larger = next((e for e in _candidates(self) if e.memory.left >= 0), None)
        remedy = (
            f"a group of {larger.config.group_size} with prefetch_depth {larger.config.prefetch_depth} would fit"
            if larger
            else f"no group of up to {self.gpu.max_group} fits; host_experts would take experts off the GPUs"
        )
        raise ConfigError(
            f"{self.model.name} does not fit on {self.gpu.name} in a group of {self.config.group_size}: a GPU needs "
            f"{self.memory.needed / gib:.1f} GiB, {-self.memory.left / gib:.1f} GiB more than it has; {remedy}"
        )

    def on_nodes(self, count: int) -> Estimate:
        """The same group on so many nodes; an equal share of a node's experts where those are others than here."""
        if count == self.nodes.count:
            return self
        config = dataclasses.replace(self.config, num_local_experts=None, memory_bytes=None)
        return dataclasses.replace(self, config=config, nodes=dataclasses.replace(self.nodes, count=count))

    def with_tokens(self, tokens: int) -> Estimate:
        """The same group with forward passes of another length, in requests like the longest one's."""
        longest = max(self.batch.lengths)
        length = None if longest == self.batch.tokens else longest
        return dataclasses.replace(self, batch=Batch.of(tokens, length))

    @cached_property
    def pays_from(self) -> int | None:
        """The fewest tokens of a forward pass, to 1 %, from which this group is no slower; ``None``: never."""
        high = 64
        while high <= SEARCHED_TOKENS and self.with_tokens(high).speedup < 1:
            high *= 2
        if high > SEARCHED_TOKENS:
            return None
        low = high // 2
        while high - low > max(1, high // 100):
            middle = (low + high) // 2
            if self.with_tokens(middle).speedup < 1:
                low = middle
            else:
                high = middle
        return high


def copy_seconds(plan: LayerPlan, gpu: GpuSpec, share: float = 1.0) -> float:
    """Seconds of a layer's copies that reach ``share`` of the links to other ranks.

    Streams run side by side, the copies of a stream one after another.
    """
    pair = share * gpu.efficiency.link * min(gpu.link_bandwidth, gpu.peer_bandwidth or gpu.link_bandwidth)
    linked = hosted = longest = 0.0
    for stream in plan.streams:
        from_host = sum(len(piece.bytes) for piece in stream if piece.owner == HOST)
        from_ranks = sum(len(piece.bytes) for piece in stream) - from_host
        linked += from_ranks
        hosted += from_host
        longest = max(longest, from_ranks / pair + from_host / gpu.host_rate)
    return max(linked / (share * gpu.pull_rate), hosted / gpu.host_rate, longest)


def disturbed_seconds(work: LayerWork, copying: float, share: float = 1.0) -> float:
    """A layer's compute when copies run for its first ``copying`` seconds and use ``share`` of the link."""
    elapsed = 0.0
    for phase in (*work.before, *work.experts):
        slowdown = 1 + (phase.slowdown - 1) * share
        under_copies = min(phase.seconds, max(0.0, copying - elapsed) / slowdown)
        elapsed += under_copies * slowdown + phase.seconds - under_copies
    return elapsed


def steady_period(work: LayerWork, copying: float, prefetch_depth: int, share: float = 1.0) -> float:
    """Seconds from one layer to the next when every layer is alike.

    Three things bound it: the compute; the copies, which follow one another; and the slots: a layer's copies begin when
    its slot is released, ``prefetch_depth`` layers before its own experts are done. ``share`` is what copies use of the
    link while they run.
    """
    experts = sum(phase.seconds for phase in work.experts)
    return max(disturbed_seconds(work, copying, share), copying, (copying + experts) / prefetch_depth)


def recommend(estimate: Estimate) -> Estimate | None:
    """The group for this model, GPU and forward pass that is fastest for every GPU; ``None`` if nothing fits.

    Among those within 1 % of the fastest, the one that leaves most memory for the KV cache.
    """
    fitting = [candidate for candidate in _candidates(estimate) if candidate.memory.kv_tokens >= estimate.batch.tokens]
    if not fitting:
        return None
    fastest = min(candidate.dwdp_seconds for candidate in fitting)
    close = [candidate for candidate in fitting if candidate.dwdp_seconds <= 1.01 * fastest]
    return max(close, key=lambda candidate: candidate.memory.left)


def _candidates(estimate: Estimate) -> Iterable[Estimate]:
    """Groups of every power of two, depths of 1 to 3, with experts spread exactly or held by several ranks."""
    gpu = estimate.gpu
    experts = estimate.share.num_experts - estimate.config.host_experts
    size = 2
    while size <= min(gpu.max_group, experts):
        least = -(-experts // size)
        for held in sorted({least, least * 3 // 2, least * 2} & set(range(experts))):
            for depth in (1, 2, 3):
                config = dataclasses.replace(
                    estimate.config, group_size=size, num_local_experts=held, prefetch_depth=depth
                )
                yield dataclasses.replace(estimate, config=config)
        size *= 2
