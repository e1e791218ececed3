"""The grouped GEMM of torch operations against dense fp64 products, and what the arguments may be."""

from __future__ import annotations

import dataclasses
import logging
import sys
from pathlib import Path

import pytest
import torch

from vmm_dwdp.errors import ConfigError
from vmm_dwdp.kernels import Format, Scales, contiguous, grouped_gemm, provider, providers, tensor_list_grouped_gemm
from vmm_dwdp.kernels.problem import MAX_ENTRIES, check
from vmm_dwdp.kernels.testing import ROUTINGS, Operands, random_operands, relative_error

# fp8 and FP4 operands give bf16 here, so what is left is the rounding of the result.
TOLERANCE = {torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float32: 1e-6}
PLAIN = [(Format.PLAIN, dtype) for dtype in (torch.bfloat16, torch.float16, torch.float32)]
FP4 = [(form, dtype) for form in (Format.NVFP4, Format.MXFP4) for dtype in (torch.bfloat16, torch.float16)]
FP8 = [(form, torch.bfloat16) for form in (Format.FP8_ROWWISE, Format.FP8_BLOCK)]


def multiply(operands: Operands, name: str = "torch") -> torch.Tensor:
    x, weights, offsets, scales = operands
    return tensor_list_grouped_gemm(x, weights, offsets, scales=scales, provider=name)


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize(("form", "dtype"), PLAIN + FP8 + FP4)
def test_against_dense_products(form: Format, dtype: torch.dtype, routing: str) -> None:
    operands = random_operands(form, num_rows=75, experts=[3, 1, 4], n=136, k=160, routing=routing, dtype=dtype)
    out = multiply(operands)
    assert out.shape == (75, 136)
    assert out.dtype == dtype
    assert relative_error(out, operands) < TOLERANCE[dtype]


@pytest.mark.parametrize(
    ("num_rows", "experts"), [(0, [2, 2]), (1, [1]), (7, [512]), (33, [1] * MAX_ENTRIES), (129, [100, 28])]
)
def test_numbers_of_rows_and_experts(num_rows: int, experts: list[int]) -> None:
    operands = random_operands(Format.PLAIN, num_rows=num_rows, experts=experts, n=16, k=32, dtype=torch.float32)
    out = multiply(operands)
    assert out.shape == (num_rows, 16)
    assert relative_error(out, operands) < 1e-6


def test_splitting_the_weights_changes_no_bit() -> None:
    whole = random_operands(Format.PLAIN, num_rows=64, experts=[8], n=24, k=64)
    split = whole._replace(weights=list(whole.weights[0].split([3, 3, 2])))
    assert torch.equal(multiply(whole), multiply(split))


def test_experts_may_lie_apart() -> None:
    operands = random_operands(Format.PLAIN, num_rows=20, experts=[4], n=16, k=32, dtype=torch.float32)
    apart = torch.empty(4, 16 * 32 + 64).normal_()
    apart[:, : 16 * 32] = operands.weights[0].flatten(1)
    weight = apart[:, : 16 * 32].unflatten(1, (16, 32))
    assert weight.stride(0) != 16 * 32
    assert torch.equal(multiply(operands), multiply(operands._replace(weights=[weight])))


def test_auto_says_what_it_chose(caplog: pytest.LogCaptureFixture) -> None:
    operands = random_operands(Format.PLAIN, num_rows=4, experts=[2], n=40, k=8, dtype=torch.float32)
    with caplog.at_level(logging.INFO, logger="vmm_dwdp.kernels"):
        multiply(operands, "auto")
        multiply(operands, "auto")
    assert [record.getMessage() for record in caplog.records if "chose 'torch'" in record.getMessage()] == [
        "provider 'auto' chose 'torch' for plain torch.float32 x [T, 8] with 1 x torch.float32 [2, 40, 8] on cpu"
    ]


def plain(**changes: object) -> Operands:
    return random_operands(Format.PLAIN, num_rows=8, experts=[2, 2], n=16, k=32)._replace(**changes)  # type: ignore[arg-type]


def with_scales(form: Format, **changes: object) -> Operands:
    operands = random_operands(form, num_rows=8, experts=[2, 2], n=160, k=160)
    assert operands.scales is not None
    return operands._replace(scales=dataclasses.replace(operands.scales, **changes))  # type: ignore[arg-type]


def offsets(*ends: int) -> torch.Tensor:
    return torch.tensor(ends, dtype=torch.int32)


def weights(*shapes: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
    return [torch.ones(shape, dtype=dtype) for shape in shapes]


BAD = {
    "no weights": (plain(weights=[]), "weights has 0 tensors; between 1 and 16"),
    "too many weights": (plain(weights=weights(*[(1, 16, 32)] * 17)), "weights has 17 tensors"),
    "x of three dimensions": (plain(x=torch.ones(2, 8, 32)), r"x must be a contiguous \[T, K\]"),
    "x with strides": (plain(x=torch.ones(32, 8, dtype=torch.bfloat16).T), r"x must be a contiguous \[T, K\]"),
    "x not aligned": (
        plain(x=torch.ones(8 * 32 + 1, dtype=torch.bfloat16)[1:].view(8, 32)),
        "x must start at a multiple of 16",
    ),
    "a weight of two dimensions": (plain(weights=weights((16, 32))), r"weights\[0\] must be \[E, N, K\]"),
    "a weight without experts": (plain(weights=weights((4, 16, 32), (0, 16, 32))), r"weights\[1\] must be \[E, N, K\]"),
    "shapes disagree": (
        plain(weights=weights((2, 16, 32), (2, 24, 32))),
        r"weights\[1\] is .*\[2, 24, 32\].*must agree",
    ),
    "dtypes disagree": (
        plain(weights=[*weights((2, 16, 32)), torch.ones(2, 16, 32)]),
        r"weights\[1\] is torch.float32",
    ),
    "transposed weights": (plain(weights=[torch.ones(4, 32, 16, dtype=torch.bfloat16).mT]), "must be contiguous"),
    "a weight not aligned": (
        plain(weights=[torch.ones(4 * 16 * 32 + 1, dtype=torch.bfloat16)[1:].view(4, 16, 32)]),
        r"weights\[0\] must start, and every expert in it, at a multiple of 16 bytes",
    ),
    "another K": (plain(weights=weights((4, 16, 40))), "rows of 40 and x has K = 32"),
    "misaligned K": (
        plain(x=torch.ones(8, 12, dtype=torch.bfloat16), weights=weights((4, 16, 12))),
        "K = 12 .* multiple of 8",
    ),
    "misaligned K of packed weights": (
        random_operands(Format.MXFP4, num_rows=8, experts=[4], n=16, k=32)._replace(
            x=torch.ones(8, 48, dtype=torch.bfloat16), weights=weights((4, 16, 24), dtype=torch.uint8)
        ),
        "K = 48 of weights .* multiple of 32",
    ),
    "another dtype of x": (plain(x=torch.ones(8, 32)), "x is torch.float32 and the weights are torch.bfloat16"),
    "an unknown dtype": (
        plain(x=torch.ones(8, 32, dtype=torch.int8), weights=weights((4, 16, 32), dtype=torch.int8)),
        "weights of torch.int8 with no scales are not a known format",
    ),
    "weights on another device": (
        plain(weights=[torch.ones(4, 16, 32, dtype=torch.bfloat16, device="meta")]),
        "one device",
    ),
    "int64 offsets": (plain(offsets=offsets(2, 4, 6, 8).long()), r"offsets must be a contiguous int32 tensor \[4\]"),
    "offsets of another length": (plain(offsets=offsets(4, 8)), r"offsets must be a contiguous int32 tensor \[4\]"),
    "decreasing offsets": (plain(offsets=offsets(2, 6, 4, 8)), r"offsets\[2\] = 4 is less than 6"),
    "a negative offset": (plain(offsets=offsets(-1, 2, 4, 8)), r"offsets\[0\] = -1 is less than 0"),
    "offsets past the rows": (plain(offsets=offsets(2, 4, 6, 9)), "offsets end at 9 and x has 8 rows"),
    "fp8 weights and bf16 x": (
        with_scales(Format.FP8_BLOCK)._replace(x=torch.ones(8, 160, dtype=torch.bfloat16)),
        "x is torch.bfloat16: with torch.float8_e4m3fn weights",
    ),
    "no scales of x": (with_scales(Format.FP8_BLOCK, x=None), "scales.x is missing"),
    "scales of x of another shape": (
        with_scales(Format.FP8_BLOCK, x=torch.ones(8, 3)),
        r"scales.x must be .*\[8, 2\].*not",
    ),
    "scales of too few weights": (
        with_scales(Format.MXFP4, weight=torch.ones(2, 160, 5).to(torch.float8_e8m0fnu)),
        "has 1 tensors for 2",
    ),
    "scales of another shape": (
        with_scales(Format.FP8_ROWWISE, weight=[torch.ones(2, 160), torch.ones(2, 161)]),
        r"scales.weight\[1\] must be a contiguous torch.float32 \[2, 160\]",
    ),
    "no global scales": (with_scales(Format.NVFP4, weight_global=None), "scales.weight_global has 0 tensors for 2"),
    "global scales of MXFP4": (
        with_scales(Format.MXFP4, weight_global=torch.ones(4)),
        "scales.weight_global is for NVFP4",
    ),
    "scales of x for FP4": (with_scales(Format.MXFP4, x=torch.ones(8)), "scales.x is for fp8"),
    "fp32 x for FP4": (with_scales(Format.MXFP4)._replace(x=torch.ones(8, 160)), "x is torch.float32: with FP4"),
    "no scales of plain weights": (plain(scales=Scales([])), "scales.weight has 0 tensors for 2 weights"),
    "scales of plain weights": (plain(scales=Scales([torch.ones(2, 16)] * 2)), "not a known format"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_refused_by_name(name: str) -> None:
    operands, sentence = BAD[name]
    for good in (plain(), *(with_scales(form) for form in Format if form is not Format.PLAIN)):
        multiply(good, "auto")  # whose providers are remembered, and must not be taken for these
    with pytest.raises(ConfigError, match=sentence):
        multiply(operands, "auto")


def test_an_unknown_provider_is_refused() -> None:
    with pytest.raises(ConfigError, match="provider = 'cublas' is not known; accepted are auto, "):
        multiply(plain(), "cublas")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_one_tensor_on_the_cpu(dtype: torch.dtype) -> None:
    operands = random_operands(Format.PLAIN, num_rows=75, experts=[6], n=136, k=160, routing="skewed", dtype=dtype)
    out = grouped_gemm(operands.x, operands.weights[0], operands.offsets)
    assert relative_error(out, operands) < TOLERANCE[dtype]


@pytest.mark.parametrize("form", [form for form in Format if form is not Format.PLAIN])
def test_one_quantised_tensor_on_the_cpu_is_refused_with_every_reason(form: Format) -> None:
    x, weights, offsets, scales = random_operands(form, num_rows=8, experts=[2], n=256, k=256)
    with pytest.raises(ConfigError, match=r"'torch' takes operands without scales.*'deep-gemm'.*'flashinfer'"):
        grouped_gemm(x, weights[0], offsets, scales=scales)


def test_providers_are_listed_and_a_broken_one_does_not_stop_the_listing(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise ImportError("half installed")

    monkeypatch.setattr(contiguous, "PROVIDERS", (contiguous.PROVIDERS[0]._replace(missing=broken),))
    listed = {status.name: status for status in providers()}
    assert list(listed) == [
        "grouped_gemm.torch",
        *(f"tensor_list_grouped_gemm.{p}" for p in ("cute", "triton", "torch")),
    ]
    assert not listed["grouped_gemm.torch"].usable
    assert listed["grouped_gemm.torch"].reason == "cannot tell: half installed"
    assert listed["tensor_list_grouped_gemm.torch"].usable


@pytest.mark.parametrize("routing", ROUTINGS)
def test_rows_are_spread_so_that_every_expert_starts_a_block(routing: str) -> None:
    operands = random_operands(Format.FP8_BLOCK, num_rows=300, experts=[6], n=128, k=256, routing=routing)
    spread = contiguous.spread_rows(check(*operands), 128)
    used = int(operands.offsets[-1])
    owners = torch.searchsorted(operands.offsets, torch.arange(used, dtype=torch.int32), right=True)
    places = spread.places[:used]
    assert operands.scales is not None
    assert operands.scales.x is not None
    assert torch.equal(spread.x.view(torch.uint8)[places], operands.x.view(torch.uint8)[:used])
    assert torch.equal(spread.scale[places], operands.scales.x[:used])
    assert torch.equal(spread.experts[places].long(), owners)
    assert places.unique().numel() == used
    blocks = spread.experts.view(-1, 128)
    assert (blocks == blocks[:, :1]).all()
    assert (blocks[-1] == -1).all()


def test_a_package_that_cannot_be_imported_is_no_provider(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "deep_gemm.py").write_text("raise OSError('built for another torch')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "deep_gemm", raising=False)
    monkeypatch.setattr(contiguous, "_needs_hopper", lambda: None)
    monkeypatch.setattr(contiguous, "not_installed", provider.not_installed.__wrapped__)
    monkeypatch.setattr(contiguous, "import_failure", provider._import_failure.__wrapped__)

    missing = contiguous._deep_gemm_missing()

    assert missing == "has the package sgl-deep-gemm, which cannot be imported: built for another torch"
