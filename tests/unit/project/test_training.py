"""What trains the model whose routing is replayed: its grouped product, its corpus and, tiny, the whole program."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

from vmm_dwdp.planning.routing import read_trace

pytest.importorskip("transformers")
TRAINING = Path(__file__).parents[3] / "training"


@pytest.fixture(scope="module")
def grouped() -> ModuleType:
    spec = importlib.util.spec_from_file_location("grouped_experts", TRAINING / "grouped_experts.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_grouped_experts_and_their_gradients_are_those_of_a_loop_in_float64(grouped: ModuleType) -> None:
    torch.manual_seed(0)
    tokens, experts, top_k, hidden, intermediate = 40, 8, 3, 32, 16

    def values(*shape: int) -> torch.Tensor:  # which bfloat16 holds
        return (torch.randn(shape) * 0.3).bfloat16().float().requires_grad_()

    up, down, x, weights = (
        values(experts, 2 * intermediate, hidden),
        values(experts, hidden, intermediate),
        values(tokens, hidden),
        values(tokens, top_k),
    )
    chosen = torch.rand(tokens, experts - 1).topk(top_k).indices  # nobody chooses the last one
    module = SimpleNamespace(num_experts=experts, gate_up_proj=up, down_proj=down, act_fn=torch.nn.functional.silu)
    gradient = torch.randn(tokens, hidden)
    found = grouped.grouped_experts(module, x, chosen, weights)
    (found * gradient).sum().backward()

    leaves = [each.detach().double().requires_grad_() for each in (up, down, x, weights)]
    exact_up, exact_down, exact_x, exact_weights = leaves
    rows = []
    for token in range(tokens):
        row = torch.zeros(hidden, dtype=torch.float64)
        for place, expert in enumerate(chosen[token].tolist()):
            gate, inner = (exact_up[expert] @ exact_x[token]).chunk(2)
            product = exact_down[expert] @ (torch.nn.functional.silu(gate) * inner)
            row = row + exact_weights[token, place] * product
        rows.append(row)
    expected = torch.stack(rows)
    (expected * gradient.double()).sum().backward()

    assert found.dtype == torch.float32
    pairs = zip((up, down, x, weights), leaves, strict=True)
    for ours, reference in ((found, expected), *((mine.grad, exact.grad) for mine, exact in pairs)):
        assert (ours - reference).norm() < 0.02 * reference.norm()  # bfloat16 has 8 bits
    assert not up.grad[-1].any()
    assert not down.grad[-1].any()


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two kinds of text of five words each, in the form of ``mixed_corpus.py``, by its own functions."""
    folder = tmp_path_factory.mktemp("corpus")
    program = f"""
import random
from pathlib import Path
from mixed_corpus import Kind, write_archive
chance = random.Random(0)
words = {{"sea": "ship wave sail salt wind".split(), "land": "tree hill road stone field".split()}}
def texts(kind, count):
    return [" ".join(chance.choices(words[kind], k=400)) for _ in range(count)]
kinds = {{kind: Kind(texts(kind, 8), texts(kind, 3)) for kind in words}}
write_archive(Path({str(folder / "corpus.tar.xz")!r}), kinds, {{kind: {{}} for kind in kinds}})
"""
    subprocess.run([sys.executable, "-c", program], cwd=TRAINING, check=True)
    return folder / "corpus.tar.xz"


def test_the_corpus_has_what_was_held_out_and_ends_each_document(archive: Path) -> None:
    with tarfile.open(archive) as opened:
        members = {member.name: opened.extractfile(member).read() for member in opened}  # type: ignore[union-attr]
    about = json.loads(members["about.json"])

    for kind in ("sea", "land"):
        tokens = np.frombuffer(members[f"held_out/{kind}.u16"], "<u2")
        assert (len(tokens), tokens[-1], (tokens == 0).sum()) == (about[kind]["held_out_tokens"], 0, 3)
    assert (np.frombuffer(members["train.u16"], "<u2") == 0).sum() == 16


def test_the_tiny_model_is_trained_and_its_trace_read(archive: Path, tmp_path: Path) -> None:
    program = [sys.executable, str(TRAINING / "train_routing.py"), str(archive), str(tmp_path)]
    options = ["--small", "--seconds", "1", "--batch", "4", "--sequences", "2", "--balance", "0.01"]
    subprocess.run([*program, *options], check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    trace = read_trace(tmp_path / "routing-0.01.npz")
    report = json.loads((tmp_path / "routing-0.01.json").read_text())

    assert trace.kinds == ("sea", "sea", "land", "land")
    assert trace.prefill.shape == trace.decode.shape == (4, 32, 2, 2)
    assert trace.num_experts == 8
    assert report["balancing_weight"] == trace.facts["balancing_weight"] == 0.01
    assert report["texts"].keys() == {"sea", "land"}

    cut = tmp_path / "cut.npz"
    sizes = ["--sequences", "1", "--prefill", "5", "--decode", "7"]
    command = [sys.executable, str(TRAINING / "cut_trace.py"), str(tmp_path / "routing-0.01.npz"), str(cut)]
    subprocess.run([*command, *sizes], check=True, capture_output=True)
    kept = read_trace(cut)

    assert kept.kinds == ("sea", "land")
    assert (kept.prefill == trace.prefill[[0, 2], -5:]).all()
    assert (kept.decode == trace.decode[[0, 2], :7]).all()
    assert kept.facts == trace.facts
