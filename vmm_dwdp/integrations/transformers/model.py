"""transformers models whose experts are spread over a group, the models' own code unchanged."""

from __future__ import annotations

import hashlib
import os
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn import Module

from vmm_dwdp.allocator.driver import Driver
from vmm_dwdp.checkpoint import fill_shards
from vmm_dwdp.config import DWDPConfig
from vmm_dwdp.errors import ConfigError, DWDPError
from vmm_dwdp.group.doors import Where
from vmm_dwdp.integrations.transformers.across_nodes import NodeExperts, NodesOfModel
from vmm_dwdp.integrations.transformers.experts import (
    ExpertsModule,
    RefreshSchedule,
    SpreadExperts,
    by_layer,
    find_experts,
)
from vmm_dwdp.integrations.transformers.loading import load_without_experts, read_spreadable_config
from vmm_dwdp.integrations.transformers.room import announce_memory, told_of_reading
from vmm_dwdp.integrations.transformers.tensor_list import IMPLEMENTATION, takes_lists
from vmm_dwdp.integrations.transformers.turns import Turns
from vmm_dwdp.model_folder import find_folder
from vmm_dwdp.nodes.rail import Rail
from vmm_dwdp.runtime import DWDPRuntime

ReadExpert = Callable[[str, int], Tensor]  # a weight's full name and an expert -> the expert's part

REFUSED_ARGUMENTS = (
    *("device_map", "device_mesh", "distributed_config", "max_memory", "offload_folder", "tp_plan", "tp_size"),
    *("adapter_kwargs", "gguf_file", "key_mapping", "state_dict", "subfolder"),
    *("config", "output_loading_info"),
)
"""Of transformers' from_pretrained: what would put weights elsewhere, take them from elsewhere, or change them. Which
files are read (``use_safetensors``, ``variant``) is transformers' choice: the experts are read from the same."""


def from_pretrained(
    path: str | os.PathLike[str],
    config: DWDPConfig,
    *,
    rank: int,
    device: str | torch.device,
    rendezvous: Where,
    model_class: type[transformers.PreTrainedModel] | None = None,
    driver: Driver | None = None,
    rail: Rail | None = None,
    timeout: float = 600.0,
    **kwargs: Any,
) -> transformers.PreTrainedModel:
    """Load a model of which this rank holds its share of the experts, and everything else.

    Of the experts only this rank's are read (and those of the host pool, on the rank that creates it), one after
    another, straight into the runtime's memory; what is replicated is loaded by transformers. Of a quantised checkpoint
    (FP8 in blocks, MXFP4, compressed-tensors) experts and their scales are spread as transformers would keep them on
    this machine; where it would dequantise them, each is as it is read.

    Args:
        path: a directory with ``config.json`` and safetensors files, as ``save_pretrained`` writes them; or the name of
            a model in huggingface_hub's cache, of which ``revision`` may be given: nothing is downloaded.
        config: of the group; this and the next three, and ``driver``, as `DWDPRuntime` takes them.
        rank: this process's place in the group.
        device: where the model is run.
        rendezvous: where the ranks of the group find each other.
        model_class: by default the class that ``config.json`` names first.
        driver: an open driver of ``device`` to use instead of a new one.
        rail: to the ranks of the same number on other nodes, over which the experts are spread: ``config``, ``rank``
            and ``rendezvous`` are of this node's group, which has its node's experts only. Then every rank of the rail
            runs as many passes as the others: see `join_pass`. It stays the caller's.
        timeout: seconds to wait for the other ranks, which may take longer to read their experts.
        kwargs: for transformers' ``from_pretrained``: ``dtype``, ``attn_implementation`` and so on.

    Returns:
        The model in evaluation mode. ``model.dwdp`` is the runtime, open; closing it is the caller's. When it raises,
        nothing stays allocated.

    Raises:
        ConfigError: the checkpoint lacks a file or an expert, or has one of another shape; it is quantised in a way
            that is not known here; the model has no stacked experts; an argument cannot be.
        ExchangeError: see `DWDPRuntime.publish`.
        DriverError: see `DWDPRuntime.publish`.
    """
    for argument in REFUSED_ARGUMENTS:
        if kwargs.pop(argument, None) not in (None, False):
            raise ConfigError(f"{argument} cannot be used with experts that are spread over a group")
    directory = find_folder(path, kwargs.get("revision"))
    described = read_spreadable_config(directory)
    model_class = model_class or _class_named_by(described, directory)
    runtime = DWDPRuntime(config, rank, device, rendezvous, driver=driver)
    with _closed_on_failure(runtime), ExitStack() as opened:
        loaded = load_without_experts(model_class, directory, described, runtime.device, kwargs, opened)
        sources = loaded.sources
        read = lambda weight, expert: sources[weight].read(expert)  # noqa: E731
        _spread(loaded.model, loaded.layers, runtime, read, timeout, loaded.revision, rail)
    return loaded.model


def attach(
    model: transformers.PreTrainedModel, runtime: DWDPRuntime, *, rail: Rail | None = None, timeout: float = 60.0
) -> None:
    """Spread the experts of a model that is whole in ordinary memory, and give that memory back.

    Every rank calls it with an equal model. What is replicated stays where it is; a model on the CPU whose runtime is
    on a GPU is moved afterwards, by ``model.to(device)``. While it runs, this rank's share exists twice. When it
    raises, the model is as it was and the runtime is closed.

    Args:
        model: afterwards ``model.dwdp`` is the runtime.
        runtime: new, without layers; closing it stays the caller's.
        rail: as `from_pretrained` takes it.
        timeout: seconds to wait for the other ranks.

    Raises:
        ConfigError: the model has no stacked experts, they are on the meta device, or the config cannot spread them.
        ExchangeError: see `DWDPRuntime.publish`.
        DriverError: see `DWDPRuntime.publish`.
    """

    def read(weight: str, expert: int) -> Tensor:
        path, _, name = weight.rpartition(".")
        whole = modules[path].whole(name)
        if whole.is_meta:
            raise ConfigError(f"{weight} is on the meta device: there are no bytes to spread")
        return whole[expert]

    with _closed_on_failure(runtime):
        modules = {found.path: found for found in find_experts(model)}
        layers = by_layer(modules.values(), lambda found, name: found.identity(name))
        _spread(model, layers, runtime, read, timeout, _revision_of(model), rail)


def _class_named_by(config: dict[str, Any], directory: Path) -> type[transformers.PreTrainedModel]:
    name = (config.get("architectures") or ["no architecture"])[0]
    found: type[transformers.PreTrainedModel] | None = getattr(transformers, name, None)
    if found is None:
        raise ConfigError(
            f"config.json of {directory} names {name}, which transformers does not have; give model_class"
        )
    return found


def _revision_of(model: Module) -> str:
    """A digest of the names, shapes and dtypes of a model's parameters, and of at most 64 numbers in each.

    It tells apart models with other weights everywhere, not those in which a few numbers differ.
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {list(parameter.shape)} {parameter.dtype} ".encode())
        if parameter.is_meta or not parameter.numel():
            continue
        count = min(64, parameter.numel())
        places = torch.arange(count, device=parameter.device) * (parameter.numel() - 1) // max(count - 1, 1)
        sampled = parameter.detach()[torch.unravel_index(places, parameter.shape)]
        digest.update(sampled.reshape(-1).view(torch.uint8).cpu().numpy().tobytes())
    return digest.hexdigest()


def _spread(
    model: transformers.PreTrainedModel,
    layers: Sequence[Sequence[ExpertsModule]],
    runtime: DWDPRuntime,
    read: ReadExpert,
    timeout: float,
    revision: str,
    rail: Rail | None,
) -> None:
    """Make a layer of each list of ``layers``, whose modules share their weights, fill it and publish it."""
    whole = [found for sharing in layers for found in sharing]
    if runtime.config.expert_bank:
        for found in whole:
            found.require_reads_rows()
    nodes = None if rail is None else NodesOfModel(rail)
    if nodes is not None:
        layers = nodes.own(layers)
        revision += f", node {nodes.rail.node} of {nodes.rail.num_nodes}"
    for layer, (found, *_) in enumerate(layers):
        runtime.add_layer(layer, found.weights)
    num_experts = min(spec.num_experts for found, *_ in layers for spec in found.weights.values())
    runtime.settle(timeout)
    announce_memory(runtime, num_experts)
    with told_of_reading(runtime, [found.weights for found, *_ in layers]) as told:
        for layer, (found, *_) in enumerate(layers):
            for name in found.weights:
                fill_shards(runtime, layer, name, told(_reader(read, found, name)))
    runtime.publish(timeout, revision=revision)
    experts = [found for sharing in layers for found in sharing]
    lists = runtime.config.assembly == "tensor_list"
    merge = lists and not all(takes_lists(found.module) for found in experts)
    if lists and not merge:
        model.set_experts_implementation(IMPLEMENTATION)
    schedule = RefreshSchedule(runtime)
    turns = Turns(runtime, len(layers))
    numbers = [layer for layer, sharing in enumerate(layers) for _ in sharing]
    spread = [
        SpreadExperts(
            found,
            runtime,
            layer,
            schedule,
            turns,
            merge=merge,
            across=None if nodes is None else NodeExperts(nodes, before, runtime, layer).run,
        )
        for layer, found, before in zip(numbers, experts, whole, strict=True)
    ]
    for path, module in model.named_modules():  # whichever is called from outside: the model, or one without a head
        if isinstance(module, transformers.PreTrainedModel) and any(found.is_in(path) for found in experts):
            vars(module).update(forward=turns.taking(module.forward))

    def apply(fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Module:
        """`Module._apply`, refused before the first parameter is moved rather than when the first experts are met."""
        for module in spread:
            module.require_stays(fn)
        moved: Module = type(model)._apply(model, fn, recurse)
        return moved

    model.__dict__.update(_apply=turns.taking(apply))
    model.dwdp = runtime
    if nodes is not None:
        model.dwdp_join = nodes.joiner(model, turns)


def _reader(read: ReadExpert, experts: ExpertsModule, name: str) -> Callable[[int], Tensor]:
    """By the number of an expert among those of ``experts``, its part of a parameter."""
    return lambda expert: read(f"{experts.path}.{name}", experts.first + expert)


@contextmanager
def _closed_on_failure(runtime: DWDPRuntime) -> Iterator[None]:
    try:
        yield
    except BaseException as failure:
        traceback.clear_frames(failure.__traceback__)  # the tensors in them would keep the runtime's memory mapped
        try:
            runtime.close()
        except DWDPError as error:
            failure.add_note(f"and then, while closing: {error}")
        raise
