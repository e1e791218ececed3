"""``vmm-dwdp plan --decode``: tokens a second of decoding in place, by the size of a bank."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from math import inf
from typing import Any, Final

from vmm_dwdp.cli.console import print_table, size
from vmm_dwdp.config import DWDPConfig
from vmm_dwdp.errors import ConfigError
from vmm_dwdp.planning.decoding import KERNELS, OF_BOUND, REST, Decoding
from vmm_dwdp.planning.formats import WeightFormat
from vmm_dwdp.planning.gpus import load_gpu
from vmm_dwdp.planning.local_experts import settled
from vmm_dwdp.planning.models import load_model
from vmm_dwdp.planning.routing import read_trace

SHARES: Final = (0.0, 1 / 16, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 3 / 4)  # of a layer's experts, for which there is a row
ONLY_HERE: Final = ("bank", "format", "link", "trace")
NOT_HERE: Final = {"nodes": 1, "network": None, "imbalance": 0.0, "plot": None, "run_bytes": None, "run_gap": None}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "decoding", "--tokens are then the sequences that a rank decodes together, --request-tokens the context of each"
    )
    group.add_argument("--decode", action="store_true", help="tokens a second, with experts read in place")
    group.add_argument(
        "--bank", metavar="SIZE", help="a bank of experts: 25%% of each layer's, or 8 GB of each GPU (default: none)"
    )
    formats = [each.value for each in WeightFormat]
    group.add_argument("--format", choices=formats, help="of the weights (default: the model's own)")
    group.add_argument("--link", type=float, metavar="GB/S", help="what a copy reaches (default: as the GPU states)")
    group.add_argument("--trace", metavar="FILE.npz", help="recorded routing (default: tokens choose evenly)")


def require_its_own(arguments: argparse.Namespace) -> None:
    """Raise `ConfigError` if something is stated that only ``--decode`` knows, or does not know."""
    for name in () if arguments.decode else ONLY_HERE:
        if getattr(arguments, name) is not None:
            raise ConfigError(f"--{name} needs --decode")
    for name, default in NOT_HERE.items() if arguments.decode else ():
        if getattr(arguments, name) != default:
            raise ConfigError(f"--{name.replace('_', '-')} is not for --decode")


def run(config: DWDPConfig, arguments: argparse.Namespace) -> int:
    """Print what a group with ``config`` comes to, with the bank that is asked for and with others."""
    decoding = _decoding(config, arguments)
    decoding.require_fit()
    banks = {decoding.bank_for(share) for share in SHARES} | {decoding.config.expert_bank}
    others = [decoding.with_bank(nbytes) for nbytes in sorted(banks) if _serves(decoding, nbytes)]
    if arguments.json:
        print(json.dumps(_as_json(decoding, others)))
    else:
        _print(decoding, others)
    return 0


def _decoding(config: DWDPConfig, arguments: argparse.Namespace) -> Decoding:
    model, gpu = load_model(arguments.model), load_gpu(arguments.gpu)
    if arguments.format:
        model = model.stored_as(WeightFormat(arguments.format))
    if arguments.link is not None and not 0 < arguments.link < inf:
        raise ConfigError(f"--link must be more than 0, not {arguments.link:g}")
    without = Decoding(
        model,
        gpu,
        settled(model, gpu, config),
        sequences=arguments.tokens,
        context=arguments.request_tokens or 0,
        trace=read_trace(arguments.trace) if arguments.trace else None,
        link=None if arguments.link is None else arguments.link * 1e9,
    )
    return without.with_bank(_bank_nbytes(arguments.bank, without)) if arguments.bank else without


def _bank_nbytes(stated: str, decoding: Decoding) -> int:
    try:
        number = float(stated.removesuffix("%"))
    except ValueError:
        number = -1.0
    if not 0 < number < inf or (stated.endswith("%") and number > 100):
        raise ConfigError(f"--bank is a share as 25%, or a number of GB, not {stated!r}")
    return decoding.bank_for(number / 100) if stated.endswith("%") else int(number * 1e9)


def _serves(decoding: Decoding, nbytes: int) -> bool:
    """Whether a bank of that size fits, and can serve such steps."""
    try:
        decoding.with_bank(nbytes).require_fit()
    except ConfigError:
        return False
    return True


def _as_json(decoding: Decoding, others: Sequence[Decoding]) -> dict[str, Any]:
    return {
        "model": decoding.model.name,
        "format": decoding.model.expert_format.value,
        "gpu": decoding.gpu.name,
        "group_size": decoding.config.group_size,
        "sequences": decoding.sequences,
        "context": decoding.context,
        "expert_bytes": decoding.expert_bytes,
        "of_bound": OF_BOUND,
        "kernels_s": decoding.kernels_seconds,
        **_step(decoding),
        "by_bank": [_step(other) for other in others],
    }


def _step(decoding: Decoding) -> dict[str, Any]:
    return {
        "bank_rows": decoding.rows,
        "bank_bytes": decoding.bank_nbytes,
        "left_for_kv_cache": decoding.left,
        **{f"used_{name}" if name != "hits" else name: value for name, value in decoding.uses._asdict().items()},
        "missed_bytes": decoding.missed_bytes,
        "link_s": max(decoding.link_seconds.values()),
        "gpu_s": decoding.gpu_seconds,
        "bound_tokens_per_s": decoding.sequences / decoding.bound_seconds,
        "expected_tokens_per_s": decoding.sequences / decoding.expected_seconds,
        "limit": decoding.limit,
    }


def _print(decoding: Decoding, others: Sequence[Decoding]) -> None:
    model, uses = decoding.model, decoding.uses
    print_table(
        f"Decoding {model.name} in {model.expert_format.value} on {decoding.gpu.name}, group of "
        f"{decoding.config.group_size}, {decoding.sequences} sequences a rank, tokens a second of a rank",
        (
            "bank of a layer",
            "of GPU memory",
            "left for the KV cache",
            "hits",
            "cross a link a step",
            "bound",
            "expected",
        ),
        [
            (
                f"{other.rows} experts" + " *" * (other == decoding),
                size(other.bank_nbytes),
                size(other.left),
                f"{100 * other.uses.hits:.1f} %",
                size(round(other.missed_bytes)),
                f"{other.sequences / other.bound_seconds:.1f}",
                f"{other.sequences / other.expected_seconds:.1f}",
            )
            for other in others
        ],
    )
    routing = "tokens choose evenly" if decoding.trace is None else "recorded routing"
    print(
        f"With {decoding.rows} experts in the bank (*): of a layer, a step uses {uses.from_host:.1f} experts in host "
        f"memory and {uses.from_ranks:.1f} on other GPUs ({routing}); one is {size(decoding.expert_bytes)}. "
        f"A step takes {1e3 * decoding.expected_seconds:.1f} ms, limited by {decoding.limit}; with everything in the "
        f"GPU's memory it would take {1e3 * decoding.gpu_seconds:.1f} by its roofline."
    )
    print(
        f"Bound: what misses, at the rate of a copy, and that. Expected: with {1e6 * KERNELS:.0f} microseconds more "
        f"for the experts of a layer and {1e6 * REST:.0f} for the rest of it, and {OF_BOUND:g} of that, as measured "
        "over PCIe."
    )
