"""Traces of routing: what is kept in the repository, what the recorder writes, and files that are broken."""

from __future__ import annotations

import io
import json
import random
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vmm_dwdp.errors import ConfigError
from vmm_dwdp.planning.routing import read_trace, used_experts

TRACES = sorted((Path(__file__).parents[3] / "benchmarks/traces").glob("*.npz"))
CHOSEN = np.array([[[[3, 0], [1, 2]], [[2, 3], [0, 1]], [[0, 1], [3, 2]]]] * 2, np.uint8)  # 2 x 3 x 2 x 2
RIGHT: dict[str, Any] = {
    "prefill": CHOSEN[:, :1],
    "decode": CHOSEN,
    "kinds": np.array(["prose", "code"]),
    "facts": np.array(json.dumps({"experts": 4, "device": "cpu"})),
}


def written(path: Path, **changes: Any) -> Path:
    np.savez(path, **{name: value for name, value in {**RIGHT, **changes}.items() if value is not None})
    return path


def test_a_trace_is_read_with_experts_in_ascending_order(tmp_path: Path) -> None:
    trace = read_trace(written(tmp_path / "trace.npz"))

    assert trace.decode[0].tolist() == [[[0, 3], [1, 2]], [[2, 3], [0, 1]], [[0, 1], [2, 3]]]
    assert trace.prefill.shape == (2, 1, 2, 2)
    assert (trace.kinds, trace.num_experts, trace.num_layers, trace.top_k) == (("prose", "code"), 4, 2, 2)
    assert trace.facts["device"] == "cpu"


def test_used_experts_are_those_that_were_chosen() -> None:
    used = used_experts(CHOSEN, 5)

    assert used.shape == (2, 3, 2, 5)
    assert all(
        set(np.flatnonzero(used[place])) == set(CHOSEN[place].tolist()) for place in np.ndindex(CHOSEN.shape[:-1])
    )


@pytest.mark.parametrize("path", TRACES, ids=lambda path: path.stem)
def test_what_is_kept_is_small_and_whole(path: Path) -> None:
    trace = read_trace(path)

    assert path.stat().st_size < 300_000
    assert len({trace.kinds.count(kind) for kind in trace.kinds}) == 1
    assert (trace.facts["layers"], trace.facts["top_k"]) == (trace.num_layers, trace.top_k)
    assert used_experts(trace.decode, trace.num_experts).any((0, 1)).all(), "an expert that no token chose"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"decode": None}, "has no array 'decode"),
        ({"facts": None}, "has no array 'facts"),
        ({"facts": np.array("{")}, "cannot be read"),
        ({"facts": np.array(["{}", "{}"])}, "cannot be read"),
        ({"facts": np.array("[]")}, "do not say how many experts"),
        ({"facts": np.array(json.dumps({"experts": "4"}))}, "do not say how many experts"),
        ({"facts": np.array(json.dumps({"experts": 3}))}, "names expert 3 of 3"),
        ({"decode": CHOSEN.astype(np.float32)}, "must be unsigned integers"),
        ({"decode": CHOSEN.astype(np.int64)}, "must be unsigned integers"),
        ({"decode": CHOSEN[0]}, "must be unsigned integers"),
        ({"decode": CHOSEN[:, :0]}, "must be unsigned integers"),
        ({"decode": CHOSEN.astype(object)}, "cannot be read"),
        ({"decode": CHOSEN // 2}, "chose one expert twice"),
        ({"prefill": CHOSEN[:1]}, "not of the same sequences"),
        ({"prefill": CHOSEN[:, :, :1]}, "not of the same sequences"),
        ({"kinds": np.array(["prose"])}, "not of the same sequences"),
    ],
)
def test_what_is_no_trace_is_named_by_one_sentence(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    path = written(tmp_path / "broken.npz", **changes)

    with pytest.raises(ConfigError, match=said) as refused:
        read_trace(path)
    assert str(path) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.npz cannot be read as a routing trace: No such file"):
        read_trace(tmp_path / "nowhere.npz")


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA])
def test_damaged_files_are_refused_by_one_sentence_or_read(tmp_path: Path, compression: int) -> None:
    path = tmp_path / "trace.npz"
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, array in RIGHT.items():
            member = io.BytesIO()
            np.save(member, array)
            archive.writestr(f"{name}.npy", member.getvalue())
    whole = path.read_bytes()
    assert read_trace(path).kinds == ("prose", "code")
    chance = random.Random(0)
    refused = []
    for _ in range(150):
        damaged = bytearray(whole)
        for _ in range(chance.randrange(1, 4)):
            damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        path.write_bytes(damaged[: chance.choice((len(damaged), chance.randrange(len(damaged))))])
        try:
            read_trace(path)
        except ConfigError as error:
            refused.append(str(error))
    assert len(refused) > 75
    assert not any("\n" in sentence for sentence in refused)
