"""Which experts tokens chose: traces recorded from a model, as `training/traces.py` in the repository writes them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from vmm_dwdp.errors import ConfigError

Chosen = npt.NDArray[np.unsignedinteger[Any]]
Used = npt.NDArray[np.bool_]

PHASES: Final = ("prefill", "decode")


@dataclass(frozen=True, eq=False)
class RoutingTrace:
    """What the routers of one model chose for some sequences.

    Attributes:
        prefill, decode: numbers of experts ``[sequences, tokens, layers, top_k]``, each token's in ascending order. A
            sequence's tokens in ``decode`` follow those in ``prefill``; of a long prompt its end may be all there is.
        kinds: what kind of text each sequence is.
        num_experts: of a layer.
        facts: what else is known of the model, by name.
    """

    prefill: Chosen
    decode: Chosen
    kinds: tuple[str, ...]
    num_experts: int
    facts: Mapping[str, Any]

    @property
    def num_layers(self) -> int:
        return int(self.decode.shape[2])

    @property
    def top_k(self) -> int:
        return int(self.decode.shape[3])

    def mixed(self) -> RoutingTrace:
        """The same sequences in an order in which neighbours are of different kinds, which come round."""
        nth = [self.kinds[:place].count(kind) for place, kind in enumerate(self.kinds)]
        names = list(dict.fromkeys(self.kinds))
        order = np.lexsort(([names.index(kind) for kind in self.kinds], nth))
        kinds = tuple(self.kinds[place] for place in order)
        return replace(self, prefill=self.prefill[order], decode=self.decode[order], kinds=kinds)

    def used(self, phase: str) -> Used:
        """What was used in one of `PHASES`, bool ``[tokens, sequences, layers, experts]``."""
        return used_experts(getattr(self, phase), self.num_experts).swapaxes(0, 1)


def read_trace(path: str | PathLike[str]) -> RoutingTrace:
    """Read the file of one trace.

    Raises:
        ConfigError: it is not there, or is no trace; the sentence names it.
    """
    try:
        with np.load(path, allow_pickle=False) as members:
            arrays = {name: members[name] for name in (*PHASES, "kinds", "facts")}
        facts = json.loads(arrays["facts"].item())
        kinds = tuple(map(str, arrays["kinds"].tolist()))
    except KeyError as error:
        raise ConfigError(f"{path} is no routing trace: it has no array {error}") from error
    except Exception as error:  # numpy, zipfile, lzma, json and the system have a kind each, and numpy says any of them
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error).partition("\n")[0]
        raise ConfigError(f"{path} cannot be read as a routing trace: {reason or type(error).__name__}") from error
    if not isinstance(facts, dict) or not isinstance(facts.get("experts"), int):
        raise ConfigError(f"{path} is no routing trace: its facts do not say how many experts a layer has")
    prefill, decode = (_ascending(f"{path}: {name}", arrays[name], facts["experts"]) for name in PHASES)
    if not len(kinds) == len(prefill) == len(decode) or prefill.shape[2:] != decode.shape[2:]:
        raise ConfigError(
            f"{path} is no routing trace: prefill {list(prefill.shape)}, decode {list(decode.shape)} and {len(kinds)} "
            "kinds are not of the same sequences and layers"
        )
    return RoutingTrace(prefill, decode, kinds, facts["experts"], facts)


def used_experts(chosen: Chosen, num_experts: int) -> Used:
    """``[..., top_k]`` numbers of experts as ``[..., num_experts]``: whether each was among them."""
    used = np.zeros((*chosen.shape[:-1], num_experts), np.bool_)
    np.put_along_axis(used, chosen.astype(np.intp), True, axis=-1)
    return used


def _ascending(name: str, chosen: npt.NDArray[Any], num_experts: int) -> Chosen:
    if chosen.ndim != 4 or 0 in chosen.shape or not np.issubdtype(chosen.dtype, np.unsignedinteger):
        raise ConfigError(
            f"{name} must be unsigned integers [sequences, tokens, layers, top_k], not {chosen.dtype} "
            f"{list(chosen.shape)}"
        )
    if chosen.max() >= num_experts:
        raise ConfigError(f"{name} names expert {chosen.max()} of {num_experts}")
    ascending: Chosen = np.sort(chosen, axis=-1)
    if (ascending[..., 1:] == ascending[..., :-1]).any():
        raise ConfigError(f"{name} has a token that chose one expert twice")
    return ascending
