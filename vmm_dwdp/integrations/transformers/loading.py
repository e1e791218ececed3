"""A checkpoint through transformers' own loader, which is left everything but the stacked experts."""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch
import transformers
from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # that of its client
from safetensors import SafetensorError
from torch.nn import Module
from torch.utils.hooks import RemovableHandle

from vmm_dwdp.checkpoint import Checkpoint, revision_of
from vmm_dwdp.errors import ConfigError
from vmm_dwdp.integrations.transformers.checkpoint import ExpertSource, OwnConversion, expert_sources
from vmm_dwdp.integrations.transformers.experts import ExpertsModule, by_layer, find_experts
from vmm_dwdp.integrations.transformers.mxfp4 import IntoKernelLayout, lay_out_experts
from vmm_dwdp.integrations.transformers.quantization import (
    dequantised,
    loading_config,
    require_known_methods,
    require_spreadable,
)
from vmm_dwdp.layout.weight_spec import WeightSpec
from vmm_dwdp.model_folder import read_config

_log = logging.getLogger("vmm_dwdp")
# While transformers loads, it takes `tie_weights` from all models of the process, and then puts back what it found: of
# two threads that did so at once, one could put back nothing, for good.
_one_at_a_time: Final = threading.Lock()

_ADAPTER_FILE: Final = "adapter_config.json"


@dataclass
class Loaded:
    """A model without its stacked experts, which are on the meta device.

    Attributes:
        model: in evaluation mode.
        layers: its modules of experts, those in one list that share their weights.
        sources: where each of their parameters comes from, by its full name; to be read while the checkpoint is open.
        revision: of the files that transformers has read, as `revision_of` tells it.
    """

    model: transformers.PreTrainedModel
    layers: list[list[ExpertsModule]]
    sources: dict[str, ExpertSource]
    revision: str


def read_spreadable_config(directory: Path) -> dict[str, Any]:
    """The ``config.json`` of ``directory``; raises `ConfigError` if what it describes cannot be spread."""
    config = read_config(directory)
    if (directory / _ADAPTER_FILE).is_file():
        raise ConfigError(f"{directory} has an adapter ({_ADAPTER_FILE}): load the model without it, and then adapt it")
    require_known_methods(directory, config)
    return config


def load_without_experts(
    model_class: type[transformers.PreTrainedModel],
    directory: Path,
    described: Mapping[str, Any],
    device: torch.device,
    kwargs: dict[str, Any],
    opened: ExitStack,
) -> Loaded:
    """Let transformers load everything but the stacked experts.

    transformers builds the model on the meta device, chooses the files, and then fills what the model's state dict
    names. In between, a subclass finds the experts, sees to it that these very files have them, and hides them from
    the state dict.

    Args:
        described: its ``config.json``.
        kwargs: for transformers' ``from_pretrained``.
        opened: keeps the files open for as long as the sources are read.

    Raises:
        ConfigError: the files are no safetensors files, lack an expert or have one of another shape; or they are
            quantised in a way in which experts cannot be spread.
    """
    loaded: list[Loaded] = []
    hiding: list[RemovableHandle] = []

    def load(model: Any, state_dict: Any, files: list[str] | None, load_config: Any, *others: Any) -> Any:
        quantizer = load_config.hf_quantizer
        require_spreadable(directory, described, quantizer, device)
        checkpoint = opened.enter_context(Checkpoint(directory, _safetensors(files)))
        lay_out_experts(model, quantizer)
        experts = [_as_loaded(load_config.dtype_plan, found) for found in find_experts(model)]
        specs = {f"{found.path}.{name}": spec for found in experts for name, spec in found.weights.items()}
        own = {name: conversion for found in experts for name, conversion in _into_kernels(found, quantizer, device)}
        sources = expert_sources(model, specs, checkpoint, quantizer, own)
        layers = by_layer(experts, lambda found, name: sources[f"{found.path}.{name}"])
        hiding.extend(found.module.register_state_dict_post_hook(_without(found.parameters)) for found in experts)
        # The checkpoint has tensors for what is hidden; transformers is not to warn of them.
        targets = {own[name].target if name in own else name for name in specs}
        expected = {re.escape(target.removeprefix(f"{model.base_model_prefix}.")) for target in targets}
        model._keys_to_ignore_on_load_unexpected |= expected
        if sentence := dequantised(directory, quantizer, [spec.dtype for spec in specs.values()]):
            _log.warning(sentence)
        loaded.append(Loaded(model, layers, sources, revision_of(directory, _safetensors(files))))
        return own_load(model, state_dict, files, load_config, *others)

    own_load = model_class._load_pretrained_model
    names = {"_load_pretrained_model": staticmethod(load), "__module__": model_class.__module__}
    loader: Any = type(model_class.__name__, (model_class,), names)
    try:
        if kwargs.get("quantization_config") is None:
            kwargs = kwargs | {"quantization_config": loading_config(described)}
        with _one_at_a_time:
            model = loader.from_pretrained(directory, device_map={"": device}, **kwargs)
    except HTTPError as error:  # for example of a quantiser that wants its kernels
        raise ConfigError(
            f"transformers cannot load {directory}: it wants something of Hugging Face's hub, which it does not get "
            f"({error})"
        ) from error
    except (OSError, SafetensorError, ImportError) as error:
        raise ConfigError(f"transformers cannot load {directory}: {error}") from error
    if not loaded:
        raise ConfigError(f"transformers loads {directory} in a way in which experts cannot be spread")
    model.__class__ = model_class
    for hook in hiding:
        hook.remove()
    return loaded[0]


def _safetensors(files: list[str] | None) -> list[Path]:
    """Raises `ConfigError` if one is of another format."""
    paths = [Path(file) for file in files or ()]
    for path in paths:
        if path.suffix != ".safetensors":
            raise ConfigError(f"transformers would read {path}, but experts are read from safetensors files only")
    return paths


def _as_loaded(dtype_plan: Mapping[str, torch.dtype], experts: ExpertsModule) -> ExpertsModule:
    """``experts`` in the dtypes in which transformers would load them: some modules are kept in fp32."""
    plan = {re.compile(pattern.replace("*", ".*")): dtype for pattern, dtype in dtype_plan.items()}

    def kept(name: str, spec: WeightSpec) -> WeightSpec:
        dtypes = [dtype for pattern, dtype in plan.items() if pattern.search(f"{experts.path}.{name}")]
        return WeightSpec(spec.shape, dtypes[0]) if dtypes and name not in experts.in_kernels else spec

    return replace(experts, weights={name: kept(name, spec) for name, spec in experts.weights.items()})


def _into_kernels(experts: ExpertsModule, quantizer: Any, device: torch.device) -> Iterator[tuple[str, OwnConversion]]:
    """By full name, how the weights of ``experts`` that are no parameters come about."""
    for name, weight in experts.in_kernels.items():
        conversion = IntoKernelLayout(name, weight.projection, experts.module, quantizer, device)
        yield f"{experts.path}.{name}", OwnConversion(f"{experts.path}.{weight.projection}", conversion)


def _without(names: Iterable[str]) -> Callable[[Module, dict[str, Any], str, Any], None]:
    """A hook that takes a module's parameters of these names out of a state dict."""

    def remove(module: Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
        for name in names:
            state_dict.pop(prefix + name)

    return remove
