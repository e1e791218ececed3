"""After a warm-up no call compiles anything, and the warm-up reads and keeps nothing."""

from __future__ import annotations

import logging
from collections import Counter

import pytest
import torch
from torch import Tensor

from vmm_dwdp.errors import ConfigError, StateError
from vmm_dwdp.kernels import (
    Format,
    Scales,
    contiguous,
    grouped_gemm,
    tensor_list,
    tensor_list_grouped_gemm,
    warm_up,
)
from vmm_dwdp.kernels.problem import Problem
from vmm_dwdp.kernels.provider import Provider, Providers
from vmm_dwdp.kernels.testing import Operands, random_operands

SIZES = {"n": 256, "k": 256}
FORMATS = pytest.mark.parametrize("form", Format, ids=lambda form: form.name)


class Compiling:
    """A provider that compiles for what a kernel may be specialised by, and counts it."""

    def __init__(self) -> None:
        self.compiled: Counter[tuple[object, ...]] = Counter()
        self.problems: list[Problem] = []
        self.provider = Provider("compiling", "everything", lambda: None, lambda problem: None, self._run)

    def _run(self, problem: Problem) -> Tensor:
        rows = 1 << (problem.x.shape[0] - 1).bit_length()
        tensors = (*problem.weights, *problem.weight_scales, *problem.global_scales)
        form = tuple((tensor.dtype, tensor.shape, tensor.stride(), tensor.data_ptr() % 16) for tensor in tensors)
        key = (problem.form, rows, problem.x.dtype, problem.x_scale is None, *form)
        if key not in self.compiled:
            self.compiled[key] += 1
            self.problems.append(problem)
        return problem.x.new_zeros((problem.x.shape[0], problem.n), dtype=problem.out_dtype)


@pytest.fixture
def compiling(monkeypatch: pytest.MonkeyPatch) -> Compiling:
    found = Compiling()
    for module in (contiguous, tensor_list):
        monkeypatch.setattr(module, "PROVIDERS", Providers((found.provider,)))
    return found


def of_weights(operands: Operands) -> Scales | None:
    scales = operands.scales
    return None if scales is None else Scales(scales.weight, weight_global=scales.weight_global)


@FORMATS
def test_calls_after_it_compile_nothing(form: Format, compiling: Compiling) -> None:
    given = random_operands(form, num_rows=64, experts=[3, 1], **SIZES)

    name = warm_up(given.weights, range(1, 65), scales=of_weights(given))

    assert name == "tensor_list_grouped_gemm.compiling"
    assert len(compiling.compiled) == 7  # 1, 2, 4, ... 64 rows
    for num_rows in range(1, 65):
        x, _, offsets, scales = random_operands(form, num_rows=num_rows, experts=[3, 1], **SIZES)
        if scales is not None and given.scales is not None:
            scales = Scales(given.scales.weight, scales.x, given.scales.weight_global)
        tensor_list_grouped_gemm(x, given.weights, offsets, scales=scales)
    assert len(compiling.compiled) == 7


@FORMATS
def test_one_tensor_is_of_the_other_function(form: Format, compiling: Compiling) -> None:
    x, (weight,), offsets, scales = random_operands(form, num_rows=64, experts=[4], **SIZES)

    assert warm_up(weight, [64], scales=of_weights(Operands(x, [weight], offsets, scales))) == "grouped_gemm.compiling"

    grouped_gemm(x, weight, offsets, scales=scales)
    assert len(compiling.compiled) == 1


@FORMATS
def test_no_row_belongs_to_an_expert(form: Format, compiling: Compiling) -> None:
    given = random_operands(form, num_rows=64, experts=[3, 1], **SIZES)

    warm_up(given.weights, [64, 1], scales=given.scales)

    assert [problem.x.shape[0] for problem in compiling.problems] == [64, 1]
    assert [problem.offsets.tolist() for problem in compiling.problems] == [[0] * 4] * 2


@pytest.mark.parametrize(("given", "used"), [(None, torch.bfloat16), (torch.float16, torch.float16)])
def test_packed_weights_do_not_say_the_dtype_of_x(
    given: torch.dtype | None, used: torch.dtype, compiling: Compiling
) -> None:
    operands = random_operands(Format.NVFP4, num_rows=1, experts=[2], **SIZES)

    warm_up(operands.weights, [1], scales=operands.scales, dtype=given)

    assert [problem.x.dtype for problem in compiling.problems] == [used]


@pytest.mark.parametrize("listed", [True, False])
def test_torch_takes_it_on_the_cpu_and_it_is_logged(listed: bool, caplog: pytest.LogCaptureFixture) -> None:
    weight = torch.zeros(4, 16, 32, dtype=torch.bfloat16)
    with caplog.at_level(logging.INFO, logger="vmm_dwdp.kernels"):
        name = warm_up([weight] if listed else weight, [3, 70, 3])

    assert name == ("tensor_list_grouped_gemm.torch" if listed else "grouped_gemm.torch")
    assert caplog.records[-1].getMessage() == (
        f"{name} is warm for plain torch.bfloat16 x [T, 32] with 1 x torch.bfloat16 [4, 16, 32] on cpu, "
        "numbers of rows from 3 to 70"
    )


WEIGHT = torch.zeros(4, 16, 32, dtype=torch.bfloat16)
BAD = {
    "no numbers": ((WEIGHT, []), r"num_rows = \[\] must be numbers of rows"),
    "no rows": ((WEIGHT, [8, 0]), r"num_rows = \[8, 0\] must be numbers of rows of at least 1"),
    "no weights": (([], [8]), r"weights must be \[E, N, K\], one or a list, not of \[\]"),
    "one expert": ((WEIGHT[0], [8]), r"weights must be \[E, N, K\], one or a list, not of \[\[16, 32\]\]"),
    "scales of nothing": ((WEIGHT, [8], Scales([])), r"scales.weight has 0 tensors for 1 weights"),
    "fp8 and scales of nothing": (
        (WEIGHT.to(torch.float8_e4m3fn), [8], Scales([])),
        "weights of torch.float8_e4m3fn with no scales are not a known format",
    ),
    "what no grouped GEMM takes": ((WEIGHT.long(), [8]), "weights of torch.int64 with no scales are not a known"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_refused(name: str) -> None:
    (weights, num_rows, *scales), sentence = BAD[name]  # type: ignore[misc]
    with pytest.raises(ConfigError, match=sentence):
        warm_up(weights, num_rows, scales=scales[0] if scales else None)


def test_an_unknown_provider_is_refused() -> None:
    with pytest.raises(ConfigError, match="provider = 'cublas' is not known; accepted are auto, torch"):
        warm_up(WEIGHT, [8], provider="cublas")


def test_it_is_refused_while_a_graph_is_captured(compiling: Compiling, monkeypatch: pytest.MonkeyPatch) -> None:
    class OnGpu(Tensor):
        device = torch.device("cuda", 0)  # type: ignore[assignment]

    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.no_grad())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(StateError, match="warm_up launches what a CUDA graph should not have"):
        warm_up(WEIGHT.as_subclass(OnGpu), [8])
    assert not compiling.compiled
