"""Grouped GEMMs of four models: existing kernels on one tensor, ours on a list of tensors, and merging the list first.

For each weight of a model, number of tokens (each goes to the model's top-k experts) and routing, in one run:

provider                  a provider of `grouped_gemm` on torch's memory
provider, assembled       the same on a range over four physical handles
list of n                 our kernel for lists, the weight split into n tensors
merge 4 + provider        four tensors copied into one, then the provider: what a runtime without either does

and, as a control, the first provider once more, on the same memory: its ratio would be 1 if times had no scatter.

A method runs in turns with the one it is compared with (`in_turns.py`). `ratio` is how many times as fast it is: the
median of all pairs, which at 95 % lies between `from` and `to`. Pairs are timed until those are 0.4 % apart where both
are the same kernel, else 2 %, but no longer than `--seconds`. Milliseconds are medians. The error is relative to fp64
products over 64 rows; `same bits` compares a whole result with that of the method compared with. Cases are measured in
the order of `--tokens`, and each row goes to stderr as soon as it is known.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from common import Row, parser, report, seen
from in_turns import Turns, in_turns, interval, sustained

from vmm_dwdp.allocator import open_driver
from vmm_dwdp.allocator.driver import Access
from vmm_dwdp.allocator.handles import Allocation, Ledger, Reservation, ResourceStack
from vmm_dwdp.allocator.tensors import tensor_at
from vmm_dwdp.kernels import Format, contiguous, grouped_gemm, tensor_list, tensor_list_grouped_gemm
from vmm_dwdp.kernels.problem import check
from vmm_dwdp.kernels.provider import choose
from vmm_dwdp.kernels.testing import Operands, random_operands, reference, some_rows

SHARDS = 4
CHECKED_ROWS = 64
SAME_KERNEL, ANOTHER = 0.002, 0.01  # to either side: how precisely a ratio should be known
DENSE = 8192  # rows, columns and depth of the dense product that gives the matrix rate


class Model(NamedTuple):
    experts: int
    hidden: int
    intermediate: int
    top_k: int

    def weights(self) -> dict[str, tuple[int, int]]:
        """N and K of each weight."""
        return {"w13": (2 * self.intermediate, self.hidden), "w2": (self.hidden, self.intermediate)}


MODELS = {
    "deepseek-r1": Model(256, 7168, 2048, 8),
    "qwen3-30b-a3b": Model(128, 2048, 768, 8),
    "gpt-oss-120b": Model(128, 2880, 2880, 4),
    "mixtral-8x7b": Model(8, 4096, 14336, 2),
}
FORMATS = {
    "bf16": Format.PLAIN,
    "fp8": Format.FP8_BLOCK,
    "fp8-rowwise": Format.FP8_ROWWISE,
    "nvfp4": Format.NVFP4,
    "mxfp4": Format.MXFP4,
}


class Method(NamedTuple):
    run: Callable[[], torch.Tensor]
    compared_with: str | None = None
    exact: bool = False  # the result must have the same bits as that of the method compared with


@contextlib.contextmanager
def assembled(weight: torch.Tensor) -> Iterator[torch.Tensor]:
    """A copy of ``weight`` over `SHARDS` physical handles side by side."""
    driver, ledger = open_driver(weight.device), Ledger()
    page = driver.granularity()
    pages = -(-weight.nbytes // page)
    with ResourceStack() as stack:
        whole = stack.push(Reservation(driver, ledger, pages * page))
        ends = [pages * (i + 1) // SHARDS for i in range(SHARDS)]
        for start, end in itertools.pairwise([0, *ends]):
            if end > start:
                whole.map(start * page, stack.push(Allocation.create(driver, ledger, (end - start) * page)))
        whole.set_access(0, pages * page, Access.READ_WRITE)
        yield tensor_at(whole.address, weight.shape, weight.dtype, weight.device).copy_(weight)
        torch.cuda.synchronize()


def methods(operands: Operands, copy: torch.Tensor, providers: list[str], entries: list[int]) -> dict[str, Method]:
    x, (weight,), offsets, scales = operands
    found: dict[str, Method] = {}
    for provider in contiguous.PROVIDERS:
        if provider.name not in providers or provider.missing() or provider.refuses(check(*operands)):
            continue

        def call(on: torch.Tensor, name: str = provider.name) -> torch.Tensor:
            return grouped_gemm(x, on, offsets, scales=scales, provider=name)

        found[provider.name] = Method(lambda call=call: call(weight))
        found[f"{provider.name}, assembled"] = Method(lambda call=call: call(copy), provider.name, exact=True)
        if len(found) == 2:
            found[f"{provider.name}, again"] = Method(found[provider.name].run, provider.name, exact=True)
    if "deep-gemm" in found:
        found["deep-gemm, rows in place"] = Method(deep_gemm_alone(operands), "deep-gemm")
    baseline = next(iter(found), None)
    ours = choose(check(*operands), tensor_list.PROVIDERS, "auto").name
    for count in entries:
        if count > weight.shape[0]:
            continue
        parts = split(operands, count)
        found[f"list of {count} ({ours})"] = Method(
            lambda parts=parts: tensor_list_grouped_gemm(
                parts.x, parts.weights, parts.offsets, scales=parts.scales, provider=ours
            ),
            f"list of 1 ({ours})" if count > 1 else "deep-gemm, rows in place" if "deep-gemm" in found else baseline,
            exact=count > 1,
        )
    if baseline is not None and f"list of {SHARDS} ({ours})" in found:
        shards = list(weight.tensor_split(SHARDS))

        def merge() -> torch.Tensor:
            torch.cat([shard.view(torch.uint8) for shard in shards], out=copy.view(torch.uint8))
            return grouped_gemm(x, copy, offsets, scales=scales, provider=baseline)

        found[f"merge {SHARDS} + {baseline}"] = Method(merge, f"list of {SHARDS} ({ours})")
    return found


def split(operands: Operands, count: int) -> Operands:
    """The same operands with the weight and its scales in ``count`` tensors."""
    scales = operands.scales
    if scales is not None:
        scales = type(scales)(
            list(scales.weight[0].tensor_split(count)),
            scales.x,
            list(scales.weight_global[0].tensor_split(count)) if scales.weight_global else None,
        )
    return operands._replace(weights=list(operands.weights[0].tensor_split(count)), scales=scales)


def deep_gemm_alone(operands: Operands) -> Callable[[], torch.Tensor]:
    """DeepGEMM's kernel on rows and scales that already lie as it wants them; returns the first rows of its result."""
    import deep_gemm

    problem = check(*operands)
    rows = contiguous.spread_rows(problem, deep_gemm.get_mk_alignment_for_contiguous_layout())
    scale = deep_gemm.get_mn_major_tma_aligned_tensor(rows.scale)
    out = rows.x.new_empty((rows.x.shape[0], problem.n), dtype=torch.bfloat16)
    weight = (problem.weights[0], problem.weight_scales[0])

    def run() -> torch.Tensor:
        deep_gemm.m_grouped_fp8_gemm_nt_contiguous((rows.x, scale), weight, out, rows.experts)
        return out

    return run


def compare(operands: Operands, found: Mapping[str, Method], seconds: float) -> Iterator[dict[str, object]]:
    """A row for each method."""
    some, picks = some_rows(operands, CHECKED_ROWS)
    expected = reference(some)
    used = int(operands.offsets[-1])
    originals = {method.compared_with for method in found.values() if method.exact}
    results: dict[str | None, torch.Tensor] = {}
    checked: dict[str, dict[str, object]] = {}
    for name, method in found.items():
        out = method.run()
        in_place = out.shape[0] != operands.x.shape[0]
        error = "-" if in_place else float((out[picks].double() - expected).norm() / expected.norm())
        same = torch.equal(out[:used], results[method.compared_with][:used]) if method.exact else "-"
        checked[name] = {"error": error, "same bits": same}
        if name in originals:
            results[name] = out
        del out
    results.clear()
    operations = 2 * used * operands.weights[0].shape[1] * operands.x.shape[1]
    turns: dict[str, Turns] = {}
    times: dict[str, list[float]] = {name: [] for name in found}
    for name, method in found.items():
        if method.compared_with:
            precision = SAME_KERNEL if method.exact else ANOTHER
            other = found[method.compared_with]
            turns[name] = in_turns(method.run, other.run, seconds=seconds, precision=precision)
            times[name] += turns[name].method
            times[method.compared_with] += turns[name].other
    for name, method in found.items():
        milliseconds = statistics.median(times[name]) if times[name] else sustained(method.run, seconds=seconds)
        ratio: dict[str, object] = dict.fromkeys(("ratio", "from", "to", "pairs"), "-")
        if name in turns:
            known = turns[name].ratios
            least, most = interval(known)
            ratio = {"ratio": statistics.median(known), "from": least, "to": most, "pairs": len(known)}
        yield {
            "method": name,
            "ms": milliseconds,
            "TFLOP/s": operations / milliseconds / 1e9,
            "compared with": method.compared_with or "-",
            **ratio,
            **checked[name],
        }


def dense_rate(device: torch.device, seconds: float) -> float:
    """TFLOP/s of torch's product of two bf16 matrices of `DENSE` rows and columns, one after another."""
    left, right = (torch.randn(DENSE, DENSE, device=device).bfloat16() for _ in range(2))
    return 2 * DENSE**3 / sustained(lambda: left @ right.T, seconds=seconds) / 1e9


def ratios(rows: Sequence[Row]) -> list[Row]:
    """A row for each format and method that is compared with another: its ratios over all cases."""
    found: dict[tuple[object, ...], list[float]] = {}
    for row in rows:
        ratio = row["ratio"]
        if isinstance(ratio, float):
            found.setdefault((row["format"], row["method"], row["compared with"]), []).append(ratio)
    columns = ("format", "method", "compared with")
    return [
        dict(zip(columns, key, strict=True))
        | {"cases": len(all_), "least": min(all_), "median": statistics.median(all_), "most": max(all_)}
        for key, all_ in found.items()
    ]


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    arguments.add_argument("--formats", nargs="+", choices=FORMATS, default=["bf16"])
    arguments.add_argument("--weights", nargs="+", choices=["w13", "w2"], default=["w13", "w2"])
    arguments.add_argument("--tokens", nargs="+", type=int, default=[1024, 2048, 4096, 8192, 16384, 32768])
    arguments.add_argument("--routing", nargs="+", choices=["balanced", "skewed"], default=["balanced", "skewed"])
    names = [provider.name for provider in contiguous.PROVIDERS]
    arguments.add_argument("--providers", nargs="*", choices=names, default=names, help="of those that are usable")
    arguments.add_argument("--entries", nargs="+", type=int, default=[1, 2, 4, 8])
    arguments.add_argument(
        "--seconds", type=float, default=1.0, help="of timing for each comparison at most (default: 1)"
    )
    arguments.add_argument(
        "--limit", type=float, default=math.inf, help="seconds after which no case begins (no limit)"
    )
    given = arguments.parse_args()
    if given.device.type != "cuda":
        arguments.error("the kernels compared here need a GPU: --device cuda")
    begin = time.monotonic()
    rates = [dense_rate(given.device, given.seconds)]
    rows: list[Row] = []
    cases = itertools.product(given.tokens, given.formats, given.models, given.weights, given.routing)
    for tokens, form, name, which, routing in cases:
        case = {"model": name, "weight": which, "format": form, "tokens": tokens, "routing": routing}
        if time.monotonic() - begin > given.limit:
            print("not measured within the limit:", *case.values(), file=sys.stderr)
            continue
        model = MODELS[name]
        n, k = model.weights()[which]
        operands = random_operands(
            FORMATS[form],
            num_rows=tokens * model.top_k,
            experts=[model.experts],
            n=n,
            k=k,
            routing=routing,
            device=given.device,
        )
        with assembled(operands.weights[0]) as copy:
            compared = compare(operands, methods(operands, copy, given.providers, given.entries), given.seconds)
            rows.extend(seen(case | row) for row in compared)
        del operands, copy
        torch.cuda.empty_cache()  # assembled ranges are not of torch's memory
    rates.append(dense_rate(given.device, given.seconds))
    dense = [{"dense bf16 TFLOP/s, first": rates[0], "last": rates[1]}]
    tables = {"dense product of the same run": dense, "ratios over all cases": ratios(rows), "grouped GEMMs": rows}
    report(given, tables)


if __name__ == "__main__":
    main()
