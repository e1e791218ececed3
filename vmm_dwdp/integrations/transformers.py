"""transformers models whose experts are spread over a group, the models' own code unchanged."""

from __future__ import annotations

import functools
import json
import os
import re
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch import Tensor
from torch.nn import Module
from torch.utils.hooks import RemovableHandle

from vmm_dwdp.allocator.driver import Driver
from vmm_dwdp.checkpoint import Checkpoint, fill_shards
from vmm_dwdp.config import DWDPConfig
from vmm_dwdp.errors import ConfigError, DWDPError
from vmm_dwdp.integrations.transformers_checkpoint import ExpertSource, expert_sources
from vmm_dwdp.integrations.transformers_experts import ExpertsModule, SpreadExperts, find_experts
from vmm_dwdp.integrations.transformers_tensor_list import IMPLEMENTATION, takes_lists
from vmm_dwdp.refresh_schedule import RefreshSchedule
from vmm_dwdp.runtime import DWDPRuntime
from vmm_dwdp.weight_spec import WeightSpec

ReadExpert = Callable[[str, int], Tensor]  # a parameter's full name and an expert -> the expert's part

REFUSED_ARGUMENTS = (
    *("device_map", "device_mesh", "distributed_config", "max_memory", "offload_folder", "tp_plan", "tp_size"),
    *("gguf_file", "key_mapping", "state_dict", "subfolder", "variant"),
    *("config", "output_loading_info", "quantization_config"),
)
"""Of transformers' from_pretrained: what would put weights elsewhere, take them from elsewhere, or change them."""


def from_pretrained(
    path: str | os.PathLike[str],
    config: DWDPConfig,
    *,
    rank: int,
    device: str | torch.device,
    rendezvous: str | os.PathLike[str] | dist.ProcessGroup,
    model_class: type[transformers.PreTrainedModel] | None = None,
    driver: Driver | None = None,
    timeout: float = 600.0,
    **kwargs: Any,
) -> transformers.PreTrainedModel:
    """Load a model of which this rank holds its share of the experts, and everything else.

    Of the experts only this rank's are read (and those of the host pool, on the rank that creates it), one after
    another, straight into the runtime's memory; what is replicated is loaded by transformers.

    Args:
        path: a directory with ``config.json`` and safetensors files, as ``save_pretrained`` writes them.
        config: of the group; this and the next three, and ``driver``, as `DWDPRuntime` takes them.
        rank: this process's place in the group.
        device: where the model is run.
        rendezvous: where the ranks of the group find each other.
        model_class: by default the class that ``config.json`` names first.
        driver: an open driver of ``device`` to use instead of a new one.
        timeout: seconds to wait for the other ranks, which may take longer to read their experts.
        kwargs: for transformers' ``from_pretrained``: ``dtype``, ``attn_implementation`` and so on.

    Returns:
        The model in evaluation mode. ``model.dwdp`` is the runtime, open; closing it is the caller's. When it raises,
        nothing stays allocated.

    Raises:
        ConfigError: the checkpoint lacks a file or an expert, or has one of another shape; it is quantised; the model
            has no stacked experts; an argument cannot be.
        ExchangeError: see `DWDPRuntime.publish`.
        DriverError: see `DWDPRuntime.publish`.
    """
    for argument in REFUSED_ARGUMENTS:
        if argument in kwargs:
            raise ConfigError(f"{argument} cannot be used with experts that are spread over a group")
    with Checkpoint(Path(path)) as checkpoint:
        described = _read_config(checkpoint.directory)
        model_class = model_class or _class_named_by(described, checkpoint.directory)
        runtime = DWDPRuntime(config, rank, device, rendezvous, driver=driver)
        with _closed_on_failure(runtime):
            model, experts, sources = _load_replicated(model_class, checkpoint, runtime.device, kwargs)
            _spread(model, experts, runtime, lambda parameter, expert: sources[parameter].read(expert), timeout)
    return model


def attach(model: transformers.PreTrainedModel, runtime: DWDPRuntime, *, timeout: float = 60.0) -> None:
    """Spread the experts of a model that is whole in ordinary memory, and give that memory back.

    Every rank calls it with an equal model. What is replicated stays where it is; a model on the CPU whose runtime is
    on a GPU is moved afterwards, by ``model.to(device)``. While it runs, this rank's share exists twice. When it
    raises, the model is as it was and the runtime is closed.

    Args:
        model: afterwards ``model.dwdp`` is the runtime.
        runtime: new, without layers; closing it stays the caller's.
        timeout: seconds to wait for the other ranks.

    Raises:
        ConfigError: the model has no stacked experts, they are on the meta device, or the config cannot spread them.
        ExchangeError: see `DWDPRuntime.publish`.
        DriverError: see `DWDPRuntime.publish`.
    """

    def read(parameter: str, expert: int) -> Tensor:
        whole: Tensor = model.get_parameter(parameter).detach()
        if whole.is_meta:
            raise ConfigError(f"{parameter} is on the meta device: there are no bytes to spread")
        return whole[expert]

    with _closed_on_failure(runtime):
        _spread(model, find_experts(model), runtime, read, timeout)


def _class_named_by(config: dict[str, Any], directory: Path) -> type[transformers.PreTrainedModel]:
    name = (config.get("architectures") or ["no architecture"])[0]
    found: type[transformers.PreTrainedModel] | None = getattr(transformers, name, None)
    if found is None:
        raise ConfigError(
            f"config.json of {directory} names {name}, which transformers does not have; give model_class"
        )
    return found


def _read_config(directory: Path) -> dict[str, Any]:
    file = directory / "config.json"
    try:
        config: dict[str, Any] = dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"cannot read {file}: {error}") from error
    if "quantization_config" in config:
        raise ConfigError(f"{directory} is quantised, which is not supported here")
    return config


def _load_replicated(
    model_class: type[transformers.PreTrainedModel],
    checkpoint: Checkpoint,
    device: torch.device,
    kwargs: dict[str, Any],
) -> tuple[transformers.PreTrainedModel, list[ExpertsModule], dict[str, ExpertSource]]:
    """Let transformers load everything but the stacked experts; they stay on the meta device.

    transformers builds the model on the meta device and then fills what its state dict names. In between, a subclass
    finds the experts, sees to it that the checkpoint has them, and hides them from the state dict.
    """
    experts: list[ExpertsModule] = []
    sources: dict[str, ExpertSource] = {}
    hiding: list[RemovableHandle] = []

    def build(model: Any, *args: Any, **kwargs: Any) -> None:
        model_class.__init__(model, *args, **kwargs)
        experts.extend(_as_loaded(model, found) for found in find_experts(model))
        specs = {f"{found.path}.{name}": spec for found in experts for name, spec in found.weights.items()}
        sources.update(expert_sources(model, specs, checkpoint))
        hiding.extend(found.module.register_state_dict_post_hook(_without(found.weights)) for found in experts)
        # The checkpoint has tensors for what is hidden; transformers is not to warn of them.
        expected = {re.escape(name.removeprefix(f"{model.base_model_prefix}.")) for name in specs}
        model._keys_to_ignore_on_load_unexpected |= expected

    loader: Any = type(model_class.__name__, (model_class,), {"__init__": build, "__module__": model_class.__module__})
    model = loader.from_pretrained(checkpoint.directory, device_map={"": device}, **kwargs)
    model.__class__ = model_class
    for hook in hiding:
        hook.remove()
    return model, experts, sources


def _as_loaded(model: Any, experts: ExpertsModule) -> ExpertsModule:
    """``experts`` in the dtypes in which transformers would load them: some modules are kept in fp32."""
    plan = {
        re.compile(pattern.replace("*", ".*")): dtype
        for pattern, dtype in model._get_dtype_plan(torch.get_default_dtype()).items()
    }

    def kept(name: str, spec: WeightSpec) -> WeightSpec:
        dtypes = [dtype for pattern, dtype in plan.items() if pattern.search(f"{experts.path}.{name}")]
        return WeightSpec(spec.shape, dtypes[0]) if dtypes else spec

    return replace(experts, weights={name: kept(name, spec) for name, spec in experts.weights.items()})


def _without(names: Iterable[str]) -> Callable[[Module, dict[str, Any], str, Any], None]:
    """A hook that takes a module's parameters of these names out of a state dict."""

    def remove(module: Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
        for name in names:
            state_dict.pop(prefix + name)

    return remove


def _spread(
    model: transformers.PreTrainedModel,
    experts: Sequence[ExpertsModule],
    runtime: DWDPRuntime,
    read: ReadExpert,
    timeout: float,
) -> None:
    for layer, found in enumerate(experts):
        runtime.add_layer(layer, found.weights)
    for layer, found in enumerate(experts):
        for name in found.weights:
            fill_shards(runtime, layer, name, functools.partial(read, f"{found.path}.{name}"))
    runtime.publish(timeout)
    lists = runtime.config.assembly == "tensor_list"
    merge = lists and not all(takes_lists(found.module) for found in experts)
    if lists and not merge:
        model.set_experts_implementation(IMPLEMENTATION)
    schedule = RefreshSchedule(runtime)
    spread = [SpreadExperts(found, runtime, layer, schedule, merge=merge) for layer, found in enumerate(experts)]

    def apply(fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Module:
        """`Module._apply`, refused before the first parameter is moved rather than when the first experts are met."""
        for module in spread:
            module.require_stays(fn)
        moved: Module = type(model)._apply(model, fn, recurse)
        return moved

    model.__dict__.update(_apply=apply)
    model.dwdp = runtime


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
