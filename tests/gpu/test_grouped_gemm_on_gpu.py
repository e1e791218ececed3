"""Every provider of grouped GEMMs against fp64 products, on torch's memory and on physical handles side by side."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from vmm_dwdp.allocator import open_driver
from vmm_dwdp.allocator.driver import Access
from vmm_dwdp.allocator.handles import Allocation, Ledger, Reservation, ResourceStack
from vmm_dwdp.allocator.tensors import tensor_at
from vmm_dwdp.errors import ConfigError
from vmm_dwdp.kernels import Format, contiguous, grouped_gemm, tensor_list, tensor_list_grouped_gemm, warm_up
from vmm_dwdp.kernels.cute import launch
from vmm_dwdp.kernels.problem import CHECK_OFFSETS, MAX_ENTRIES, check
from vmm_dwdp.kernels.provider import Provider
from vmm_dwdp.kernels.testing import ROUTINGS, Operands, random_operands, relative_error
from vmm_dwdp.kernels.triton.launch import TRITON

pytestmark = pytest.mark.gpu

KINDS = [(Format.PLAIN, torch.bfloat16), (Format.PLAIN, torch.float16), (Format.PLAIN, torch.float32)]
KINDS += [(form, torch.bfloat16) for form in Format if form is not Format.PLAIN]
# What is left is the rounding of the result; fp32 sums of a few hundred products for the rest.
TOLERANCE = {torch.bfloat16: 2.5e-3, torch.float16: 4e-4, torch.float32: 1e-5}


def multiply(operands: Operands, provider: Provider) -> torch.Tensor:
    x, weights, offsets, scales = operands
    if provider in contiguous.PROVIDERS:
        return grouped_gemm(x, weights[0], offsets, scales=scales, provider=provider.name)
    return tensor_list_grouped_gemm(x, weights, offsets, scales=scales, provider=provider.name)


TRITON_FORMS = 6  # of 1 to 1100 rows and 8 experts: widths of 16, 16 and 32, 16 and 64, 32 and 64, 64, and 128


def count_compiles(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Forget what was compiled; what Triton and the CuTe DSL compile from now on."""
    compiled: list[object] = []
    if tensor_list.PROVIDERS[1].missing() is None:
        from triton import knobs

        from vmm_dwdp.kernels.triton.grouped_gemm import _kernel

        _kernel.device_caches.clear()
        monkeypatch.setattr(knobs.runtime, "jit_cache_hook", lambda *, key, **others: compiled.append(key))
    if tensor_list.PROVIDERS[0].missing() is None:
        from cutlass import cute

        launch._compiled.clear()
        compile_one = cute.compile

        def count(*arguments: object, **options: object) -> object:
            compiled.append(arguments[0])
            return compile_one(*arguments, **options)

        monkeypatch.setattr(cute, "compile", count)
    return compiled


def skip_unless_taken(provider: Provider, operands: Operands) -> None:
    reason = provider.missing() or provider.refuses(check(*operands))
    if reason:
        pytest.skip(f"{provider.name} {reason}")


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize(("form", "dtype"), KINDS)
@pytest.mark.parametrize("provider", contiguous.PROVIDERS, ids=lambda provider: provider.name)
def test_contiguous(provider: Provider, form: Format, dtype: torch.dtype, routing: str) -> None:
    operands = random_operands(
        form, num_rows=777, experts=[8], n=384, k=512, routing=routing, dtype=dtype, device="cuda"
    )
    skip_unless_taken(provider, operands)
    assert relative_error(multiply(operands, provider), operands) < TOLERANCE[dtype]


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize(("form", "dtype"), KINDS)
@pytest.mark.parametrize("provider", tensor_list.PROVIDERS, ids=lambda provider: provider.name)
def test_list(provider: Provider, form: Format, dtype: torch.dtype, routing: str) -> None:
    operands = random_operands(
        form, num_rows=1500, experts=[3, 1, 4], n=520, k=1056, routing=routing, dtype=dtype, device="cuda"
    )
    skip_unless_taken(provider, operands)
    assert relative_error(multiply(operands, provider), operands) < TOLERANCE[dtype]


@pytest.mark.parametrize("routing", ["balanced", "skewed", "one"])
@pytest.mark.parametrize(("form", "dtype"), KINDS)
def test_triton_with_few_rows(form: Format, dtype: torch.dtype, routing: str) -> None:
    """Some experts take the narrow tile, some the wide one."""
    operands = random_operands(
        form, num_rows=100, experts=[3, 1, 4], n=520, k=1056, routing=routing, dtype=dtype, device="cuda"
    )
    skip_unless_taken(TRITON, operands)
    assert relative_error(multiply(operands, TRITON), operands) < TOLERANCE[dtype]


@pytest.mark.parametrize(
    ("num_rows", "experts"), [(1, [1]), (3, [512]), (600, [1] * MAX_ENTRIES), (9000, [500, 12]), (5, [100, 28])]
)
@pytest.mark.parametrize("provider", tensor_list.PROVIDERS[:2], ids=lambda provider: provider.name)
def test_numbers_of_rows_and_experts(provider: Provider, num_rows: int, experts: list[int]) -> None:
    operands = random_operands(Format.PLAIN, num_rows=num_rows, experts=experts, n=264, k=136, device="cuda")
    skip_unless_taken(provider, operands)
    assert relative_error(multiply(operands, provider), operands) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("provider", tensor_list.PROVIDERS[:2], ids=lambda provider: provider.name)
def test_only_the_rows_of_experts_are_written(provider: Provider) -> None:
    operands = random_operands(Format.PLAIN, num_rows=1000, experts=[4], n=256, k=64, routing="short", device="cuda")
    skip_unless_taken(provider, operands)
    poisoned = torch.full((1000, 256), 7.0, dtype=torch.bfloat16, device="cuda")
    del poisoned  # the caching allocator hands the same block to the output
    out = multiply(operands, provider)
    assert (out[int(operands.offsets[-1]) :] == 7.0).all()
    assert relative_error(out, operands) < TOLERANCE[torch.bfloat16]


@pytest.fixture
def assembled() -> Iterator[torch.Tensor]:
    """3 MiB over four physical handles: a weight ``[8, 384, 512]`` of any format crosses a border within an expert."""
    driver, ledger = open_driver(torch.device("cuda", 0)), Ledger()
    page = driver.granularity()
    with ResourceStack() as stack:
        range_ = stack.push(Reservation(driver, ledger, 4 * page))
        for i in range(4):
            range_.map(i * page, stack.push(Allocation.create(driver, ledger, page)))
        range_.set_access(0, 4 * page, Access.READ_WRITE)
        yield tensor_at(range_.address + page // 4 * 7, (3 << 20,), torch.uint8, driver.device)
        torch.cuda.synchronize()
    assert not ledger.open()


@pytest.mark.parametrize("form", Format, ids=lambda form: form.name)
@pytest.mark.parametrize(
    "provider", [*contiguous.PROVIDERS, *tensor_list.PROVIDERS], ids=lambda provider: provider.name
)
def test_same_bits_on_assembled_memory(provider: Provider, form: Format, assembled: torch.Tensor) -> None:
    operands = random_operands(form, num_rows=777, experts=[8], n=384, k=512, device="cuda")
    skip_unless_taken(provider, operands)
    weight = operands.weights[0]
    copy = assembled[: weight.nbytes].view(weight.dtype).view(weight.shape)
    copy.copy_(weight)
    expected = multiply(operands, provider)
    assert torch.equal(multiply(operands._replace(weights=[copy]), provider), expected)


@pytest.mark.parametrize("form", [Format.PLAIN, Format.FP8_BLOCK, Format.NVFP4])
@pytest.mark.parametrize("provider", tensor_list.PROVIDERS[:2], ids=lambda provider: provider.name)
def test_in_a_cuda_graph_with_other_offsets(provider: Provider, form: Format) -> None:
    shape = {"num_rows": 500, "experts": [5, 3], "n": 256, "k": 256, "device": "cuda"}
    operands = random_operands(form, routing="skewed", **shape)
    skip_unless_taken(provider, operands)
    multiply(operands, provider)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = multiply(operands, provider)
    for routing in ROUTINGS:
        operands.offsets.copy_(random_operands(form, routing=routing, **shape).offsets)
        graph.replay()
        torch.cuda.synchronize()
        assert relative_error(out, operands) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("form", Format, ids=lambda form: form.name)
@pytest.mark.parametrize("provider", tensor_list.PROVIDERS[:2], ids=lambda provider: provider.name)
def test_nothing_is_compiled_after_a_warm_up(provider: Provider, form: Format, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = {"experts": [5, 3], "n": 384, "k": 512, "device": "cuda"}
    operands = random_operands(form, num_rows=500, **shape)
    skip_unless_taken(provider, operands)
    compiled = count_compiles(monkeypatch)

    name = warm_up(operands.weights, range(1, 1101), scales=operands.scales, provider=provider.name)

    assert name == f"tensor_list_grouped_gemm.{provider.name}"
    assert len(compiled) == {"cute": 1, "triton": TRITON_FORMS}[provider.name]
    compiled.clear()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # the first call with rows that experts have
        captured = multiply(operands, provider)
    graph.replay()
    assert relative_error(captured, operands) < TOLERANCE[torch.bfloat16]
    for num_rows in (*range(1, 140), 511, 512, 513, 1000, 1100):
        other = random_operands(form, num_rows=num_rows, routing="skewed", **shape)
        multiply(other, provider)
    assert not compiled


@pytest.mark.parametrize("form", Format, ids=lambda form: form.name)
@pytest.mark.parametrize("provider", contiguous.PROVIDERS, ids=lambda provider: provider.name)
def test_other_providers_take_rows_of_nobody(provider: Provider, form: Format) -> None:
    """A warm-up gives them such rows only; what they compute after it is right."""
    operands = random_operands(form, num_rows=777, experts=[8], n=384, k=512, device="cuda")
    skip_unless_taken(provider, operands)
    name = warm_up(operands.weights[0], [777, 1], scales=operands.scales, provider=provider.name)
    assert name == f"grouped_gemm.{provider.name}"
    assert relative_error(multiply(operands, provider), operands) < TOLERANCE[torch.bfloat16]


def test_offsets_are_checked_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    operands = random_operands(Format.PLAIN, num_rows=64, experts=[2], n=64, k=64, device="cuda")
    operands.offsets.fill_(65)
    tensor_list_grouped_gemm(*operands[:3])
    monkeypatch.setenv(CHECK_OFFSETS, "1")
    with pytest.raises(ConfigError, match="offsets end at 65 and x has 64 rows"):
        tensor_list_grouped_gemm(*operands[:3])
