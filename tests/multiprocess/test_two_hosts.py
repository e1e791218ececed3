"""Groups over two hosts: right bytes or a sentence, whoever dies, is cut off or knows another secret."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from support.groups import PAGE, Shapes, random_model
from support.hosts import Host, loopback, namespaces
from support.ranks import Bytes, InProcess, Outcome, Side, digest, start_server

from vmm_dwdp import DWDPConfig, TCPRendezvous

CONFIG = DWDPConfig(group_size=3, host_experts=2, mode="in_place", resident_cache=10 * PAGE)
SHAPES: Shapes = {number: {"w": ((11, 1777), torch.bfloat16)} for number in range(3)}
HOST_OF = (0, 1, 0)  # by rank
PORT = 29600
REFUSALS = {"ExchangeError", "Silent"}
LONG, SHORT = 60.0, 2.0  # seconds


def model_of(seed: int) -> Bytes:
    return {
        (number, name): tensor.view(torch.uint8).numpy().tobytes()
        for number, weights in random_model(SHAPES, seed).items()
        for name, tensor in weights.items()
    }


OLD, NEW, NEWER = map(model_of, range(3))


class Group:
    """Ranks in processes on two hosts."""

    def __init__(self, hosts: list[Host], secrets: Path, stack: ExitStack) -> None:
        self.hosts = hosts
        self._stack = stack
        self._secrets = secrets
        self.addresses = [f"{hosts[at].address}:{PORT + rank}" for rank, at in enumerate(HOST_OF)]
        self.ranks = [self.start(rank) for rank in range(CONFIG.group_size)]

    def start(self, rank: int, secret: str = "the secret of all") -> InProcess:
        """A process that has stated its layers."""
        path = self._secrets / f"{secret[:11]}-{rank}"
        path.touch(0o600)
        path.write_text(secret)
        layers = {
            number: {name: (shape, str(dtype).removeprefix("torch.")) for name, (shape, dtype) in weights.items()}
            for number, weights in SHAPES.items()
        }
        rendezvous = TCPRendezvous(self.addresses, secret_file=path)
        started = InProcess(Side(CONFIG, rank, rendezvous, layers, network=self.hosts[HOST_OF[rank]].process))
        self._stack.callback(started.end)
        for result in [started.begin("make"), *(started.begin("add_layer", number) for number in SHAPES)]:
            assert result() == Outcome("done", None)
        return started

    def all(self, command: str, *arguments: Any, only: tuple[int, ...] = (0, 1, 2), **options: Any) -> list[Outcome]:
        """What comes of a command that the ranks get at once."""
        results = [self.ranks[rank].begin(command, *arguments, **options) for rank in only]
        return [result() for result in results]

    def publish(self) -> None:
        assert self.all("fill", OLD) == [Outcome("done", None)] * 3
        assert self.all("call", "publish", LONG) == [Outcome("done", None)] * 3

    def check(self, model: Bytes, only: tuple[int, ...] = (0, 1, 2)) -> None:
        """A pass in each mode gives every rank the bytes of ``model``."""
        for mode in "staged", "in_place":
            for number in SHAPES:
                expected = {name: digest(model[number, name]) for name in SHAPES[number]}
                assert self.all("acquire", number, mode=mode, only=only) == [Outcome("done", expected)] * len(only)
                assert self.all("release", number, only=only) == [Outcome("done", None)] * len(only)

    def close(self) -> None:
        assert self.all("close") == [Outcome("done", [])] * 3


@pytest.fixture(params=[loopback, namespaces], ids=["loopback", "namespaces"])
def group(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Group]:
    start_server()
    with ExitStack() as stack:
        hosts = stack.enter_context(request.param())
        yield Group(hosts, tmp_path, stack)


@pytest.fixture
def apart(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Group]:
    """Whose hosts can be cut off from each other."""
    start_server()
    with ExitStack() as stack:
        yield Group(stack.enter_context(namespaces()), tmp_path, stack)


def test_passes_updates_and_a_rank_that_dies_and_comes_back(group: Group) -> None:
    group.publish()
    group.check(OLD)
    assert group.all("update", NEW, None, LONG) == [Outcome("done", None)] * 3
    group.check(NEW)
    for dead, others in ((1, (0, 2)), (0, (1, 2))):  # the one on a host of its own; the one that holds the host's pool
        group.ranks[dead].kill()
        for rank, outcome in zip(others, group.all("call", "peers", only=others), strict=True):
            assert outcome.told == {other: other != dead for other in range(3) if other != rank}
        group.check(NEW, only=others)
        left = [outcome.told for outcome in group.all("update", NEWER, None, LONG, only=others)]
        assert all(told.startswith("nothing was written: ") for told in left)
        assert any(f"rank {dead} left: nobody listens at {group.addresses[dead]} any more" in told for told in left)
        group.check(NEW, only=others)
        group.ranks[dead] = group.start(dead)
        assert group.all("call", "rejoin", LONG, only=(dead,)) == [Outcome("done", None)]
        group.check(NEW)
    assert group.all("update", NEWER, None, LONG) == [Outcome("done", None)] * 3
    group.check(NEWER)
    group.close()


def test_a_rank_with_another_secret(group: Group) -> None:
    group.ranks[1] = replaced(group, 1, "another secret, as long")
    assert group.all("fill", OLD) == [Outcome("done", None)] * 3
    outcomes = group.all("call", "publish", 1.5 * SHORT)
    assert all(outcome.kind in REFUSALS for outcome in outcomes)
    assert any("knows another secret or other addresses" in outcome.told for outcome in outcomes)
    group.close()


def replaced(group: Group, rank: int, secret: str) -> InProcess:
    assert group.all("close", only=(rank,)) == [Outcome("done", [])]
    return group.start(rank, secret)


def test_a_host_that_is_cut_off_and_comes_back(apart: Group) -> None:
    here, away = apart.hosts
    apart.publish()
    with away.silent_to(here):
        (answers,) = apart.all("call", "peers", 0.5, only=(0,))
        assert answers.told[1] is False
        apart.check(OLD)
        (failed,) = apart.all("update", NEW, None, SHORT, only=(0,))
        assert failed.told.startswith(f"nothing was written: rank 1 takes no connections at {apart.addresses[1]}: ")
        apart.ranks[2].kill()
        apart.ranks[2] = apart.start(2)
        assert apart.all("call", "rejoin", 3 * SHORT, only=(2,)) == [Outcome("done", None)]
        (doubtful,) = apart.all("acquire", 0, only=(2,))
        assert doubtful.told.startswith("weights are partly old and partly new: rank 1 does not tell whether an update")
        apart.check(OLD, only=(0, 1))
    assert apart.all("update", NEW, None, LONG) == [Outcome("done", None)] * 3
    apart.check(NEW)
    apart.close()


def test_a_host_that_is_cut_off_from_the_beginning(apart: Group) -> None:
    here, away = apart.hosts
    assert apart.all("fill", OLD) == [Outcome("done", None)] * 3
    with here.silent_to(away):
        outcomes = apart.all("call", "publish", SHORT)
    assert all(outcome.kind in REFUSALS for outcome in outcomes)
    assert f"rank 1 takes no connections at {apart.addresses[1]}: " in " ".join(outcome.told for outcome in outcomes)
    apart.close()
