"""How transformers makes its stacked experts out of a checkpoint, applied to one expert at a time.

transformers 5 has renamings and converters from the names in a checkpoint to the parameters of a model: stack the
experts' matrices, concatenate gate and up, transpose, and so on. None of its converters for experts mixes one expert
with another, so a converter that is given the tensors of a single expert gives that expert's part of the parameter.
That this is so is checked for every parameter, on the shapes in the files' headers, before any expert is read.

[Note: Quantised experts]
    A quantiser of transformers changes a model in one of two ways. Where the machine can compute with what the
    checkpoint has, its experts modules have parameters for the quantised weights and for their scales, both stacked by
    expert, and each has a converter. Elsewhere the modules stay as they are, and the converter of a parameter begins by
    dequantising: it collects the scales beside the weights. Either way an expert's bytes and its scales come through
    its converter alone, so both are spread like other experts, and nothing here knows a format. What its converter
    leaves in no parameter brings a conversion of its own: see [Note: Kernel layouts].
"""

from __future__ import annotations

import re
import sys
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType, SimpleNamespace
from typing import Any, NamedTuple, Protocol

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from vmm_dwdp.checkpoint import Checkpoint
from vmm_dwdp.errors import ConfigError
from vmm_dwdp.layout.weight_spec import WeightSpec


@dataclass
class _Group:
    """Tensors of a checkpoint that one conversion turns into one or several parameters."""

    target: str  # the first of those parameters: the name that transformers gives the group
    converter: WeightConverter | None  # None: the group's only tensor is the parameter
    names: dict[str, list[str]] = field(default_factory=dict)  # by source pattern, in the order of the experts

    @property
    def parameters(self) -> list[str]:
        if self.converter is None:
            return [self.target]
        first, *others = self.converter.target_patterns
        return [self.target, *(self.target.replace(first, other) for other in others)]


class _Part(NamedTuple):
    """Bytes of one expert: a whole tensor, or one row of a tensor in which the experts are stacked."""

    name: str
    row: int | None


class Conversion(Protocol):
    """What makes one expert's part of a weight out of the checkpoint's tensors of that expert."""

    def needs(self, pattern: str) -> bool:
        """Whether it wants the bytes of tensors of this source pattern; without, they are on the meta device."""

    def convert(self, tensors: Mapping[str, list[torch.Tensor]]) -> torch.Tensor:
        """``[1, ...]``, of ``tensors`` by source pattern; on the meta device if all of them are."""


class OwnConversion(NamedTuple):
    """How a weight that is no parameter comes about.

    Attributes:
        target: the full name of the parameter for which transformers takes its tensors.
        conversion: what is made of them.
    """

    target: str
    conversion: Conversion


def expert_sources(
    model: Any,
    specs: Mapping[str, WeightSpec],
    checkpoint: Checkpoint,
    quantizer: Any = None,
    own: Mapping[str, OwnConversion] = MappingProxyType({}),
) -> dict[str, ExpertSource]:
    """Where each stacked weight of ``model`` comes from; nothing is read but headers, and shapes that are tensors.

    Args:
        model: a ``PreTrainedModel``; it may be on the meta device.
        specs: the stacked weights, by full name, in the dtypes in which they are wanted.
        checkpoint: stays open for as long as the sources are read.
        quantizer: transformers' ``HfQuantizer`` of the checkpoint, which has prepared ``model``; see
            [Note: Quantised experts].
        own: those of ``specs`` that are no parameters.

    Returns:
        By weight. Parameters that are tied, of which the checkpoint has one, have the same source.

    Raises:
        ConfigError: an expert is missing, or what is there does not give an expert of the parameter's shape; or it is
            quantised, and the model is not.
    """
    if quantizer is None:
        _require_unquantised(checkpoint)
    targets = {name: own[name].target if name in own else name for name in specs}
    groups = _groups(model, {*model.state_dict(), *targets.values()}, checkpoint, quantizer)
    group_of = {parameter: group for group in groups for parameter in group.parameters}
    tied_to = getattr(model, "all_tied_weights_keys", {})
    stored: dict[str, str] = {}  # by weight, the one whose tensors the checkpoint has
    for weight, parameter in targets.items():
        first = tied_to.get(parameter, parameter)
        tied = [parameter, first, *(other for other in specs if tied_to.get(other) == first)]
        found = next((name for name in tied if name in group_of), None)
        if found is None:
            raise ConfigError(f"{checkpoint.directory} has no tensor for {parameter}")
        stored[weight] = weight if weight in own else found

    def source(weight: str) -> ExpertSource:
        group = group_of[targets[weight]]
        converter = own[weight].conversion if weight in own else _ByConverter(weight, specs, group, model.config)
        return ExpertSource(weight, specs[weight], group, checkpoint, converter, quantizer)

    sources = {name: source(name) for name in dict.fromkeys(stored.values())}
    return {weight: sources[name] for weight, name in stored.items()}


def _require_unquantised(checkpoint: Checkpoint) -> None:
    """Raise `ConfigError` if tensors of 8 bits or less have scales beside them, which nothing says how to apply.

    transformers loads such a checkpoint as if the scales were not there, and the model answers nonsense.
    """
    names = sorted(checkpoint.names)
    for name in names:
        bits = re.search(r"\d+", checkpoint.dtype(name))  # of a dtype as safetensors writes it: F8_E4M3, BF16, BOOL
        if bits is None or int(bits[0]) > 8:
            continue
        stem = name.removesuffix(".weight")
        beside = names[bisect_left(names, stem) : bisect_right(names, stem + chr(sys.maxunicode))]
        scale = next((other for other in beside if "scale" in other.removeprefix(stem)), None)
        if scale is not None:
            raise ConfigError(
                f"{checkpoint.directory} is quantised, and its config.json does not say how: {name} is "
                f"{checkpoint.dtype(name)} and has {scale} beside it"
            )


def _groups(model: Any, parameters: Iterable[str], checkpoint: Checkpoint, quantizer: Any) -> list[_Group]:
    """Every tensor of the checkpoint in its group, found as transformers finds it among ``parameters``."""
    transforms = get_model_conversion_mapping(model, hf_quantizer=quantizer)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    converter_of = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    known = dict.fromkeys(parameters, True)
    groups: dict[str, _Group] = {}
    for name in sorted(checkpoint.names, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, known)
        if target not in known and name in known:
            target, pattern = name, None  # a pattern matched a name that is the model's own already
        group = groups.setdefault(target, _Group(target, converter_of.get(pattern)))
        group.names.setdefault(pattern or name, []).append(name)
    return list(groups.values())


class _OneExpert:
    """As much of a model as conversions ask for: its parameters' shapes, of one expert, and their dtypes."""

    def __init__(self, config: Any, specs: Mapping[str, WeightSpec]) -> None:
        self.config = config
        self._specs = specs

    def get_parameter(self, name: str) -> torch.Tensor:
        return torch.empty(self._specs[name].of(1), dtype=self._specs[name].dtype, device="meta")

    def get_submodule(self, path: str) -> SimpleNamespace:
        names = [name for name in self._specs if name.rpartition(".")[0] == path]
        return SimpleNamespace(**{name.rpartition(".")[2]: self.get_parameter(name) for name in names})


class _ByConverter:
    """By transformers' own converter of a group of tensors."""

    def __init__(self, parameter: str, specs: Mapping[str, WeightSpec], group: _Group, config: Any) -> None:
        self._parameter = parameter
        self._group = group
        self._one_expert = _OneExpert(config, specs)

    def needs(self, pattern: str) -> bool:
        return True

    def convert(self, tensors: Mapping[str, list[torch.Tensor]]) -> torch.Tensor:
        converter, target = self._group.converter, self._group.target
        if converter is None:
            return next(iter(tensors.values()))[0]
        for pattern, found in tensors.items():
            for tensor in found:
                converter.add_tensor(target, target, pattern, tensor)
        model = self._one_expert
        converted = converter.convert(target, model=model, config=model.config)[self._parameter]
        expert: torch.Tensor = converted[0] if isinstance(converted, list) else converted
        return expert


class ExpertSource:
    """Where one stacked weight ``[E, ...]`` comes from, expert by expert."""

    def __init__(
        self,
        weight: str,
        spec: WeightSpec,
        group: _Group,
        checkpoint: Checkpoint,
        conversion: Conversion,
        quantizer: Any,
    ) -> None:
        self._weight = weight
        self._spec = spec
        self._group = group
        self._checkpoint = checkpoint
        self._conversion = conversion
        self._quantizer = quantizer
        self._check_every_expert()

    def read(self, expert: int) -> torch.Tensor:
        """The part of ``expert`` in the weight's dtype."""
        tensors = {
            pattern: [self._tensor(pattern, part) for part in parts] for pattern, parts in self._parts(expert).items()
        }
        converted = self._conversion.convert(tensors)[0].detach()
        if converted.dtype == torch.uint8:  # scales that are exponents, and are stored as bytes
            return converted.view(self._spec.dtype)
        return converted.to(self._spec.dtype)

    def _tensor(self, pattern: str, part: _Part) -> torch.Tensor:
        """``part`` for the conversion."""
        if self._conversion.needs(pattern):
            return self._cast(self._checkpoint.read(part.name, part.row), part)
        return self._checkpoint.empty(part.name, part.row)

    def _cast(self, tensor: torch.Tensor, part: _Part) -> torch.Tensor:
        """In the dtype in which transformers converts it: the parameter's, except for what has to be dequantised."""
        if self._quantizer is None:
            return tensor.to(self._spec.dtype)
        if hasattr(self._quantizer, "get_new_dtype"):
            dtype = self._quantizer.get_new_dtype(self._group.converter, tensor, self._spec.dtype)
        else:  # transformers 5.17 and before
            kept = part.name != self._group.target or not tensor.is_floating_point()
            dtype = None if kept else self._spec.dtype
        return tensor if dtype is None else tensor.to(dtype)

    def _parts(self, expert: int) -> dict[str, list[_Part]]:
        """By source pattern, where the bytes of ``expert`` are."""
        return {
            pattern: [_Part(names[0], expert)]
            if self._is_stacked(names)
            else [_Part(name, None) for name in names[expert :: self._spec.num_experts]]
            for pattern, names in self._group.names.items()
        }

    def _is_stacked(self, names: list[str]) -> bool:
        return len(names) == 1 and self._checkpoint.shape(names[0])[:1] == (self._spec.num_experts,)

    def _check_every_expert(self) -> None:
        for names in self._group.names.values():
            if not self._is_stacked(names) and len(names) % self._spec.num_experts:
                found = f"has {names[0]} {list(self._checkpoint.shape(names[0]))}"
                raise ConfigError(
                    f"{self._weight} has {self._spec.num_experts} experts, but {self._checkpoint.directory} "
                    f"{_missing(names, self._spec.num_experts) or found}"
                )
        fitting: set[str] = set()  # the combinations of shapes that gave one expert's part
        for expert in range(self._spec.num_experts):
            parts = self._parts(expert)
            shapes = {pattern: [self._shape(part) for part in found] for pattern, found in parts.items()}
            if str(shapes) in fitting:
                continue
            if problem := self._misfit(parts):
                tensors = [f"{part.name} {list(self._shape(part))}" for found in parts.values() for part in found]
                raise ConfigError(
                    f"expert {expert} of {self._weight} must have the shape {list(self._spec.shape[1:])}, but "
                    f"{problem}; {self._checkpoint.directory} has {', '.join(tensors)}"
                )
            fitting.add(str(shapes))

    def _shape(self, part: _Part) -> tuple[int, ...]:
        shape = self._checkpoint.shape(part.name)
        return shape if part.row is None else (1, *shape[1:])

    def _misfit(self, parts: dict[str, list[_Part]]) -> str | None:
        """Why tensors like these do not give one expert's part, found out by converting tensors without bytes."""
        tensors = {pattern: [self._without_bytes(part) for part in found] for pattern, found in parts.items()}
        try:
            shape = tuple(self._conversion.convert(tensors).shape)
        except Exception as error:  # each conversion has its own way to say that it cannot
            return f"conversion fails ({error})"
        return None if shape == self._spec.of(1) else f"conversion gives {list(shape[1:])}"

    def _without_bytes(self, part: _Part) -> torch.Tensor:
        """A tensor like the one that `read` converts; one that is a shape, as int4 weights have, has its numbers."""
        like = self._checkpoint.empty(part.name, part.row)
        if like.dim() <= 1 and not like.is_floating_point():
            return self._checkpoint.read(part.name, part.row)
        return self._cast(like, part)


def _missing(names: list[str], num_experts: int) -> str | None:
    """Which tensor is missing among ``names``, one for each expert; told by the only number in which they differ."""
    split = [name.split(".") for name in names]
    columns = [column for column, parts in enumerate(zip(*split, strict=False)) if len(set(parts)) > 1]
    if len(columns) != 1:
        return None
    present = {parts[columns[0]] for parts in split}
    expert = next((str(expert) for expert in range(num_experts) if str(expert) not in present), None)
    return expert and f"has no {'.'.join([*split[0][: columns[0]], expert, *split[0][columns[0] + 1 :]])}"
