"""What is asked of providers, and how often: each answer once, for all that it depends on, in any thread."""

from __future__ import annotations

import dataclasses
import gc
import logging
import sys
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from vmm_dwdp.errors import ConfigError
from vmm_dwdp.kernels import Format, provider, providers, tensor_list
from vmm_dwdp.kernels.cute import launch
from vmm_dwdp.kernels.cute.launch import CUTE
from vmm_dwdp.kernels.problem import Problem
from vmm_dwdp.kernels.provider import Provider, Providers
from vmm_dwdp.kernels.testing import Operands, random_operands

THREADS = 8


class Fake:
    """A provider that counts what it is asked; its results are filled with ``mark``."""

    def __init__(self, name: str, mark: float) -> None:
        self.asked: Counter[str] = Counter()
        self.refusal: str | None = None
        self.refusal_now: str | None = None
        self.mark = mark
        self._lock = threading.Lock()
        self.provider = Provider(
            name, "everything", self._missing, self._refuses, self._run, refuses_now=self._refuses_now
        )

    def _count(self, what: str) -> None:
        with self._lock:
            self.asked[what] += 1

    def _missing(self) -> None:
        self._count("missing")

    def _refuses(self, problem: Problem) -> str | None:
        self._count("refuses")
        return self.refusal

    def _refuses_now(self, problem: Problem) -> str | None:
        return self.refusal_now

    def _run(self, problem: Problem) -> Tensor:
        self._count("run")
        return problem.x.new_full((problem.x.shape[0], problem.n), self.mark, dtype=torch.float32)


def ones_and_twos() -> tuple[Fake, Fake, Providers]:
    first, second = Fake("ones", 1.0), Fake("twos", 2.0)
    return first, second, Providers((first.provider, second.provider))


def operands(form: Format = Format.FP8_BLOCK, num_rows: int = 8) -> Operands:
    return random_operands(form, num_rows=num_rows, experts=[2, 2], n=128, k=256)


def multiplied_by(offered: Providers, given: Operands, name: str = "auto") -> float:
    """The mark of the provider that did it."""
    out = offered.multiply(given.x, given.weights, given.offsets, given.scales, name)
    assert out.shape == (given.x.shape[0], given.weights[0].shape[1])
    return float(out.unique())


@pytest.mark.parametrize("form", Format)
def test_a_provider_is_asked_once_for_any_number_of_rows(form: Format) -> None:
    first, second, offered = ones_and_twos()

    assert [multiplied_by(offered, operands(form, num_rows)) for num_rows in (8, 8, 1, 300)] == [1.0] * 4

    assert first.asked == {"missing": 1, "refuses": 1, "run": 4}
    assert not second.asked


def apart(weight: Tensor) -> Tensor:
    """The same experts with room between them."""
    size = weight[0].numel()
    whole = torch.zeros((weight.shape[0], size + 64), dtype=weight.dtype)
    whole[:, :size].view(torch.uint8).copy_(weight.flatten(1).view(torch.uint8))
    return whole[:, :size].unflatten(1, weight.shape[1:])


OTHERS: dict[str, tuple[Operands, Operands]] = {
    "dtype": (
        random_operands(Format.PLAIN, num_rows=8, experts=[2], n=128, k=256),
        random_operands(Format.PLAIN, num_rows=8, experts=[2], n=128, k=256, dtype=torch.float16),
    ),
    "K": (
        random_operands(Format.PLAIN, num_rows=8, experts=[2], n=128, k=256),
        random_operands(Format.PLAIN, num_rows=8, experts=[2], n=128, k=512),
    ),
    "N": (operands(), random_operands(Format.FP8_BLOCK, num_rows=8, experts=[2, 2], n=136, k=256)),
    "experts": (operands(), random_operands(Format.FP8_BLOCK, num_rows=8, experts=[3, 1], n=128, k=256)),
    "number of tensors": (operands(), random_operands(Format.FP8_BLOCK, num_rows=8, experts=[4], n=128, k=256)),
    "form of scales": (operands(), operands(Format.FP8_ROWWISE)),
    "FP4 format": (operands(Format.NVFP4), operands(Format.MXFP4)),
    "strides": (operands(), operands()._replace(weights=[apart(weight) for weight in operands().weights])),
}


@pytest.mark.parametrize("what", OTHERS)
def test_a_provider_is_asked_again_for_another(what: str) -> None:
    first, second, offered = ones_and_twos()
    known, other = OTHERS[what]
    multiplied_by(offered, known)
    first.refusal = "is asked again"

    assert multiplied_by(offered, known) == 1.0
    assert multiplied_by(offered, other) == 2.0

    assert first.asked["refuses"] == 2
    assert second.asked == {"missing": 1, "refuses": 1, "run": 1}


def test_names_are_told_apart() -> None:
    _, _, offered = ones_and_twos()

    assert [multiplied_by(offered, operands(), name) for name in ("auto", "twos", "ones", "auto", "twos")] == [
        *(1.0, 2.0, 1.0, 1.0, 2.0)
    ]


def test_scales_of_as_many_rows_are_wanted_at_every_call() -> None:
    _, _, offered = ones_and_twos()
    good, more = operands(num_rows=8), operands(num_rows=9)
    assert good.scales is not None
    assert more.scales is not None
    multiplied_by(offered, good)

    with pytest.raises(ConfigError, match=r"scales.x must be .*\[8, 2\].*not"):
        multiplied_by(offered, good._replace(scales=dataclasses.replace(good.scales, x=more.scales.x)))


def test_what_offsets_hold_is_checked_at_every_call() -> None:
    _, _, offered = ones_and_twos()
    given = operands()
    multiplied_by(offered, given)
    given.offsets[-1] = 9

    with pytest.raises(ConfigError, match="offsets end at 9 and x has 8 rows"):
        multiplied_by(offered, given)


@pytest.mark.parametrize("known_before", [True, False])
def test_a_refusal_of_the_moment_is_not_remembered(known_before: bool) -> None:
    first, second, offered = ones_and_twos()
    if known_before:
        multiplied_by(offered, operands())

    first.refusal_now = "cannot just now"
    assert multiplied_by(offered, operands()) == 2.0
    with pytest.raises(ConfigError, match=r"is not possible: provider 'ones' cannot just now$"):
        multiplied_by(offered, operands(), "ones")
    second.refusal_now = "cannot either"
    with pytest.raises(ConfigError, match=r"provider 'ones' cannot just now; provider 'twos' cannot either$"):
        multiplied_by(offered, operands())

    first.refusal_now = second.refusal_now = None
    assert multiplied_by(offered, operands()) == 1.0
    assert multiplied_by(offered, operands(), "ones") == 1.0


def test_a_refusal_for_good_is_said_at_every_call() -> None:
    first, _, offered = ones_and_twos()
    first.refusal = "takes nothing"

    for _ in range(2):
        with pytest.raises(ConfigError, match=r"is not possible: provider 'ones' takes nothing$"):
            multiplied_by(offered, operands(), "ones")
        with pytest.raises(ConfigError, match="provider = 'threes' is not known; accepted are auto, ones, twos"):
            multiplied_by(offered, operands(), "threes")


@pytest.fixture
def threads_interleave() -> Iterator[None]:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


def at_once(call: Callable[[], float]) -> list[float]:
    barrier = threading.Barrier(THREADS)

    def run() -> float:
        barrier.wait()
        return call()

    with ThreadPoolExecutor(THREADS) as pool:
        return [future.result() for future in [pool.submit(run) for _ in range(THREADS)]]


class Together(list[Tensor]):
    """Weights of which the number is asked by all threads at once: when none of them has found its provider."""

    barrier = threading.Barrier(THREADS)

    def __len__(self) -> int:
        self.barrier.wait()
        return super().__len__()


@pytest.mark.usefixtures("threads_interleave")
def test_threads_ask_once_between_them(caplog: pytest.LogCaptureFixture) -> None:
    first, _, offered = ones_and_twos()
    given = random_operands(Format.PLAIN, num_rows=8, experts=[5], n=48, k=40)  # of no other test: it is logged

    def run() -> float:
        return multiplied_by(offered, given._replace(weights=Together(given.weights)))

    with caplog.at_level(logging.INFO, logger="vmm_dwdp.kernels"):
        assert at_once(run) == [1.0] * THREADS

    assert first.asked == {"missing": 1, "refuses": 1, "run": THREADS}
    assert len([record for record in caplog.records if "'auto' chose 'ones'" in record.getMessage()]) == 1


@pytest.mark.usefixtures("threads_interleave")
def test_an_import_that_fails_is_tried_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = "half_a_package_of_kernels"
    tries = tmp_path / "tries"
    (tmp_path / f"{module}.py").write_text(
        f"open({str(tries)!r}, 'a').write('.')\nraise OSError('a symbol is missing')"
    )
    monkeypatch.syspath_prepend(tmp_path)
    first, _, _ = ones_and_twos()
    second = Fake("twos", 2.0)
    offered = Providers((first.provider._replace(imports=module), second.provider))

    assert at_once(lambda: multiplied_by(offered, operands())) == [2.0] * THREADS
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"provider 'ones' cannot be imported: a symbol is missing$"):
            multiplied_by(offered, operands(), "ones")

    assert tries.read_text() == "."
    assert first.asked["run"] == 0


def test_an_import_that_is_not_needed_is_not_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, _ = ones_and_twos()
    offered = Providers((first.provider, second.provider._replace(imports="a_package_that_nobody_has")))

    assert multiplied_by(offered, operands()) == 1.0
    with pytest.raises(ConfigError, match="provider 'twos' cannot be imported: No module named"):
        multiplied_by(offered, operands(), "twos")


def test_few_answers_are_remembered_and_no_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provider, "MAX_REMEMBERED", 2)
    first, _, offered = ones_and_twos()
    given = [random_operands(Format.PLAIN, num_rows=4, experts=[2], n=16 * i, k=32) for i in range(1, 6)]

    assert [multiplied_by(offered, each) for each in [*given, *given]] == [1.0] * 10
    assert len(offered._chosen) <= 2
    assert first.asked["run"] == 10

    weight = weakref.ref(given[-1].weights[0])
    given.clear()
    gc.collect()
    assert weight() is None


@pytest.fixture
def blackwell(monkeypatch: pytest.MonkeyPatch) -> Providers:
    """Our CuTe kernel as a machine with a B200 sees it, but taking all and multiplying nothing, and another."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (10, 0))
    monkeypatch.setattr(launch, "not_installed", lambda module, package: None)
    provider._report.cache_clear()
    provider._warn.cache_clear()
    cute, twos = Fake("cute", 1.0), Fake("twos", 2.0)
    return Providers((CUTE._replace(refuses=cute.provider.refuses, run=cute.provider.run, imports=None), twos.provider))


def test_a_kernel_that_never_ran_is_chosen_by_name_only(blackwell: Providers, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="vmm_dwdp.kernels"):
        assert multiplied_by(blackwell, operands()) == 2.0
        assert not caplog.records
        for form in (Format.FP8_BLOCK, Format.PLAIN, Format.FP8_BLOCK):
            assert multiplied_by(blackwell, operands(form), "cute") == 1.0
        assert multiplied_by(blackwell, operands()) == 2.0

    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage().startswith("provider 'cute' has never been run on a Blackwell GPU (sm_100)")


def test_a_kernel_that_never_ran_is_not_the_last_resort(blackwell: Providers) -> None:
    with pytest.raises(ConfigError, match=r"provider 'cute' has never been run on a Blackwell GPU \(sm_100\)"):
        multiplied_by(Providers(blackwell[:1]), operands())


def test_a_kernel_that_never_ran_is_listed_so(blackwell: Providers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_list, "PROVIDERS", blackwell)
    listed = {status.name: status for status in providers()}["tensor_list_grouped_gemm.cute"]
    assert listed.usable
    assert listed.reason.startswith("has never been run on a Blackwell GPU")


@pytest.mark.parametrize(
    ("capability", "arch", "missing"),
    [
        ((9, 0), "sm_90a", None),
        ((10, 0), "sm_100a", None),
        ((8, 0), None, "needs a Hopper GPU (sm_90), and this one is sm_80"),
        ((10, 3), None, "needs a Hopper GPU (sm_90), and this one is sm_103"),
        ((12, 0), None, "needs a Hopper GPU (sm_90), and this one is sm_120"),
    ],
)
def test_what_the_cute_kernel_is_compiled_for(
    capability: tuple[int, int], arch: str | None, missing: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = []

    def compile_kernel(dtype: torch.dtype, num_entries: int, arch: str) -> Callable[..., None]:
        compiled.append((dtype, num_entries, arch))
        return lambda *arguments: None

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.no_grad())
    monkeypatch.setattr(launch, "not_installed", lambda module, package: None)
    monkeypatch.setattr(launch, "_arch", launch._arch.__wrapped__)
    monkeypatch.setattr(launch, "_num_ctas", lambda device: 132)
    monkeypatch.setattr(launch, "compile_kernel", compile_kernel)

    assert CUTE.missing() == missing
    if arch is not None:
        x, weights, offsets, scales = operands()
        CUTE.run(provider.check(x, weights, offsets, scales))
        assert compiled == [(x.dtype, 2, arch)]
