"""Who is let in at a rank's door: nobody whom the directory, the kernel, the token or the format do not vouch for."""

from __future__ import annotations

import array
import contextlib
import ctypes
import faulthandler
import json
import os
import resource
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from support.doors import (
    CHECKSUMS,
    GROUP,
    GROUP_SIZE,
    TOKEN,
    Place,
    UnixPlace,
    answer_to,
    exchange,
    request,
    serving,
    soon,
)
from support.failing_calls import FailingCalls
from support.groups import check_pass, published, random_model

from vmm_dwdp import HOST, DWDPConfig, ExchangeError
from vmm_dwdp.allocator.handles import Descriptor, Ledger
from vmm_dwdp.allocator.sharing import MAGIC, receive
from vmm_dwdp.group.agreement import LAST_STEP
from vmm_dwdp.group.exchange import PUBLISHING, Exchange
from vmm_dwdp.group.rendezvous import TOKEN_NBYTES, Rendezvous
from vmm_dwdp.group.transport import MAX_REQUEST_NBYTES, Transport

HEADER = struct.Struct("!4sII")
pytestmark = pytest.mark.usefixtures("open_descriptors")


# -- sockets in it -----------------------------------------------------------------------------------------------------
def test_a_link_to_a_socket_is_neither_followed_nor_kept(unix: UnixPlace, tmp_path: Path, ledger: Ledger) -> None:
    directory = unix.directory
    with serving(UnixPlace(tmp_path / "elsewhere"), ledger) as elsewhere, serving(unix, ledger, 1) as door:
        (directory / "rank-0").symlink_to(tmp_path / "elsewhere" / "rank-0")
        with pytest.raises(ExchangeError, match="rank-0 is not a socket"):
            door.collect(0, 0, {"device": 2}, soon())
        assert not door.alive(0, soon())
        with serving(unix, ledger, 0):
            assert not (directory / "rank-0").is_symlink()
            assert door.alive(0, soon())
        assert (tmp_path / "elsewhere" / "rank-0").is_socket()
        assert not elsewhere.alive(1, soon())


@pytest.mark.parametrize("name", ["rank-0", f".rank-0-{os.getpid()}"], ids=["listening", "half made"])
def test_a_socket_that_a_dead_process_left_is_replaced(unix: UnixPlace, ledger: Ledger, name: str) -> None:
    directory = unix.directory
    directory.mkdir(0o700)
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(directory / name))
    with serving(unix, ledger, 1) as door, serving(unix, ledger, 0):
        assert door.alive(0, soon())
    assert list(directory.iterdir()) == []


def test_a_living_rank_keeps_its_place(place: Place, ledger: Ledger) -> None:
    with serving(place, ledger), serving(place, ledger, 1) as door:
        with pytest.raises(
            ExchangeError, match=r"rank 0 cannot listen at .*: (another process does|Address already in)"
        ):
            exchange(place.door(0), ledger, 0).serve(soon())
        assert door.alive(0, soon())


def test_of_two_that_come_as_one_rank_at_the_same_instant_one_is_refused(
    place: Place, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both look whether the place is free before either takes it, if nothing keeps them from it."""
    both_have_looked = threading.Barrier(2)

    def look(self: Transport, rank: int) -> bool:
        found = listens(self, rank)
        with contextlib.suppress(threading.BrokenBarrierError):
            both_have_looked.wait(0.2)
        return found

    def come() -> str:
        door = exchange(place.door(0), ledger, 0)
        try:
            door.serve(soon())
        except ExchangeError as error:
            return str(error)
        there.append(door)
        return ""

    listens = Transport.listens
    monkeypatch.setattr(Transport, "listens", look)
    there = []
    with ThreadPoolExecutor(2) as pool:
        refusals = sorted(pool.map(lambda _: come(), range(2)))
    for door in there:
        door.close()
    assert refusals[0] == ""
    assert refusals[1].endswith(("another process does", "Address already in use"))


def test_a_rank_that_is_too_busy_to_answer_has_not_left(place: Place, ledger: Ledger) -> None:
    door = exchange(place.door(1), ledger, 1)
    with place.listener(0, backlog=0):
        assert door.listens(0)
        assert door.listens(0), "also when the kernel's queue is full"
        assert not door.alive(0, time.monotonic() + 0.1)
    assert not door.listens(0)


def test_a_directory_that_another_process_keeps_locked(unix: UnixPlace, ledger: Ledger) -> None:
    door = exchange(unix.door(0), ledger, 0)
    with (
        Rendezvous(unix.directory).locked(soon()),
        pytest.raises(ExchangeError, match="another process keeps it locked"),
    ):
        door.serve(time.monotonic())


def test_a_directory_whose_name_is_too_long_for_a_socket(tmp_path: Path, ledger: Ledger) -> None:
    directory = tmp_path / ("long" * 40)
    door = exchange(UnixPlace(directory).door(0), ledger, 0)
    with pytest.raises(ExchangeError, match=r"cannot listen at .*: AF_UNIX path too long"):
        door.serve(soon())
    assert [entry.name for entry in directory.iterdir()] == ["token"]
    door.close()
    assert list(directory.iterdir()) == []


# -- who asks, and who answers -----------------------------------------------------------------------------------------
def say(sock: socket.socket, data: bytes) -> None:
    """And nothing more; the other end may have heard enough before the end of it."""
    with contextlib.suppress(BrokenPipeError):
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)


def ends_without_an_answer(sock: socket.socket) -> bool:
    sock.settimeout(60)
    try:
        return sock.recv(1) == b""
    except ConnectionResetError:  # there was more to read for the other end
        return True


def framed(payload: bytes, magic: bytes = MAGIC, fds: int = 0, nbytes: int | None = None) -> bytes:
    return HEADER.pack(magic, fds, len(payload) if nbytes is None else nbytes) + payload


def test_another_user_is_not_answered(unix: UnixPlace, ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(unix, ledger), monkeypatch.context() as patched:
        patched.setattr("vmm_dwdp.group.unix_door.peer_uid", lambda sock: os.getuid() + 1)
        with unix.connect(0) as sock:
            say(sock, framed(json.dumps(request(unix)).encode()))
            assert ends_without_an_answer(sock)


def test_another_user_is_not_asked(unix: UnixPlace, ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor told the token."""
    door = exchange(unix.door(1), ledger, 1)
    with unix.listener(0, backlog=1) as listener:
        monkeypatch.setattr("vmm_dwdp.group.unix_door.peer_uid", lambda sock: os.getuid() + 1)
        with pytest.raises(ExchangeError, match=r"user \d+ listens at"):
            door.collect(0, 0, {"device": 1}, soon())
        client, _ = listener.accept()
        with client:
            assert client.recv(1) == b""


STRANGERS: dict[str, Callable[[UnixPlace], bytes]] = {
    "nothing": lambda place: b"",
    "no header": lambda place: MAGIC,
    "another program": lambda place: b"GET / HTTP/1.1\r\n\r\n",
    "another format": lambda place: framed(b"{}", magic=b"VMD2"),
    "too long": lambda place: framed(b" " * (MAX_REQUEST_NBYTES + 1)),
    "gigabytes": lambda place: framed(b"", nbytes=(1 << 32) - 1),
    "cut short": lambda place: framed(json.dumps(request(place)).encode()[:-1], nbytes=200),
    "descriptors announced": lambda place: framed(json.dumps(request(place)).encode(), fds=1),
    "not JSON": lambda place: framed(b"{"),
    "not UTF-8": lambda place: framed(b'{"token": "\xff"}'),
    "not an object": lambda place: framed(b"[1]"),
    "nested": lambda place: framed(b"[" * MAX_REQUEST_NBYTES),
    "no token": lambda place: framed(json.dumps(request(place, token=...)).encode()),
    "another token": lambda place: framed(json.dumps(request(place, token="00" * TOKEN_NBYTES)).encode()),
    "half a token": lambda place: framed(json.dumps(request(place, token=request(place)["token"][:32])).encode()),
    "not hexadecimal": lambda place: framed(json.dumps(request(place, token="token")).encode()),
    "a number": lambda place: framed(json.dumps(request(place, token=7)).encode()),
}


@pytest.mark.parametrize("stranger", STRANGERS)
def test_a_stranger_is_not_answered_and_costs_nobody_anything(unix: UnixPlace, ledger: Ledger, stranger: str) -> None:
    with serving(unix, ledger):
        with unix.connect(0) as sock:
            say(sock, STRANGERS[stranger](unix))
            assert ends_without_an_answer(sock)
        assert answer_to(unix, request(unix), ledger) == ALIVE


@pytest.mark.parametrize("announced", [0, 1])
@pytest.mark.parametrize("part", ["header", "payload"])
def test_descriptors_that_come_with_a_request_are_closed(
    unix: UnixPlace, ledger: Ledger, announced: int, part: str
) -> None:
    with serving(unix, ledger):
        payload = json.dumps(request(unix)).encode()
        header = framed(b"", fds=announced, nbytes=len(payload))
        ours, theirs = os.pipe()
        with Descriptor(ledger, ours), unix.connect(0) as sock:
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [theirs] * 20))]
            sock.sendmsg([header], rights if part == "header" else [])
            with contextlib.suppress(BrokenPipeError):  # the header was enough for it
                sock.sendmsg([payload], rights if part == "payload" else [])
            os.close(theirs)
            assert ends_without_an_answer(sock)
            assert os.read(ours, 1) == b"", "somebody still holds the other end of the pipe"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"version": 1}, "it speaks version 5 of the protocol, not 1"),
        ({"version": ...}, "not None"),
        ({"fingerprint": "another"}, "the configs or the layers of the two ranks differ"),
        ({"revision": "another"}, "the two ranks were given different checkpoints"),
        ({"rank": 3}, "the group has 3 ranks, and none of the others is 3"),
        ({"rank": 0}, "none of the others is 0"),
        ({"rank": -1}, "none of the others is -1"),
        ({"rank": True}, "none of the others is True"),
        ({"rank": [0]}, r"none of the others is \[0\]"),
        ({"rank": ...}, "none of the others is None"),
        ({"ask": "everything"}, "does not know how to answer 'everything'"),
        ({"ask": ["alive"]}, "does not know how to answer"),
        ({"ask": ...}, "does not know how to answer None"),
        ({"ask": "say", "vector": 5}, "it does not say what it knows, but 5"),
        ({"ask": "say", "vector": [[0, ""]]}, "it does not say what it knows"),
        ({"ask": "say", "vector": [[0, ""], [0, ""], ["0", ""]]}, "it does not say what it knows"),
        ({"ask": "step", "step": "1"}, "it does not say what it knows, but .* and '1'"),
        ({"ask": "say", "group": "another"}, "it is not, or not yet, of the group that asks"),
        ({"ask": "shares", "owner": 0, "group": []}, "it is not, or not yet, of the group that asks"),
        ({"ask": "say", "group": ""}, "its group is published already: a rank that has died comes back by rejoin"),
        ({"ask": "shares", "owner": 3}, "there is no owner 3"),
        ({"ask": "shares", "owner": {}}, "there is no owner {}"),
        ({"ask": "shares", "owner": 0, "place": "the moon"}, "there is no place 'the moon'"),
        ({"ask": "shares", "owner": 0, "place": [1]}, r"there is no place \[1\]"),
        ({"ask": "checksums", "owner": None}, "there is no owner None"),
    ],
)
def test_a_member_is_told_its_mistake(place: Place, ledger: Ledger, changes: dict[str, Any], sentence: str) -> None:
    """And a mistake is nobody else's affair."""
    with contextlib.ExitStack() as stack:
        doors = [stack.enter_context(serving(place, ledger, rank)) for rank in range(GROUP_SIZE)]
        answer = answer_to(place, request(place, **changes), ledger)
        with pytest.raises(AssertionError, match=sentence):
            raise AssertionError(answer["error"])
        with ThreadPoolExecutor(GROUP_SIZE) as pool:
            list(pool.map(together, doors))


def together(door: Exchange) -> None:
    with door.attempt("update", "something", soon()):
        for step in range(1, LAST_STEP + 1):
            door.step(step, "done", soon())


@pytest.mark.parametrize("name", [None, [[1, "a"], [1, "b"], [1, "c"]]])
def test_shares_are_given_to_those_who_publish_together(place: Place, ledger: Ledger, name: object) -> None:
    """Not to who was there before, and not to who comes for the next attempt."""
    with serving(place, ledger) as door:
        door._group = PUBLISHING
        asked = request(place, ask="shares", owner=0, group=PUBLISHING, vector=name)
        told = answer_to(place, asked, ledger)
        assert told == {"error": "rank 0 is not in the attempt to publish that this is asked for"}


ALIVE = {"error": None, "group": GROUP, "asleep": False, "settled": None}
ANSWERS: dict[str, tuple[dict[str, Any] | bytes, str]] = {
    "not JSON": (b"{", "not a JSON object"),
    "a list": (b"[]", "not a JSON object"),
    "nested": (b"[" * 4000, "not a JSON object"),
    "tokens of a number": ({"error": None, "tokens": 5}, "tokens that are not hexadecimal"),
    "tokens of numbers": ({"error": None, "tokens": [5]}, "tokens that are not hexadecimal"),
    "tokens of words": ({"error": None, "tokens": ["word"]}, "tokens that are not hexadecimal"),
    "too few": ({"error": None, "place": "device"}, "sent 1 shares of 0 instead of 2"),
    "too many": ({"error": None, "place": "device", "tokens": ["00", "00"]}, "sent 3 shares of 0 instead of 2"),
    "elsewhere": ({"error": None, "place": "host", "tokens": ["00"]}, "rank 0 has no memory of 0 at device"),
    "nowhere": ({"error": None, "place": [], "tokens": ["00"]}, "rank 0 has no memory of 0 at device"),
    "an error": ({"error": "no time"}, "rank 0 refused: no time"),
}


@pytest.mark.parametrize("answer", ANSWERS)
def test_an_answer_that_cannot_be_is_refused_and_its_descriptors_closed(
    unix: UnixPlace, ledger: Ledger, answer: str
) -> None:
    said, sentence = ANSWERS[answer]
    payload = said if isinstance(said, bytes) else json.dumps(said).encode()
    door = exchange(unix.door(1), ledger, 1)
    with unix.listener(0, backlog=1) as listener:

        def reply() -> None:
            client, _ = listener.accept()
            with client:
                receive(client, max_bytes=MAX_REQUEST_NBYTES, max_fds=0, deadline=soon(), ledger=ledger)
                client.sendall(framed(b"", fds=1, nbytes=len(payload)))
                client.sendmsg([b"."], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0]))])
                client.sendall(payload)

        replying = threading.Thread(target=reply)
        replying.start()
        with pytest.raises(ExchangeError, match=sentence):
            door.collect(0, 0, {"device": 2}, soon())
        replying.join()
    assert ledger.open() == []


@pytest.mark.parametrize("sums", [None, 7, [1, 2], [1, 2, "3"], [1, 2, 3.0], {"0": 1, "1": 2, "2": 3}])
def test_checksums_that_cannot_be(
    unix: UnixPlace, ledger: Ledger, sums: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    door = exchange(unix.door(1), ledger, 1)
    monkeypatch.setattr(door._transport, "ask", lambda *args, **kwargs: ({"numbers": sums}, []))
    with pytest.raises(ExchangeError, match="did not send 3 checksums"):
        door.collect_numbers("checksums", 0, 0, 3, soon())


def test_a_member_is_given_shares_and_checksums(unix: UnixPlace, ledger: Ledger) -> None:
    with serving(unix, ledger), serving(unix, ledger, 1) as door:
        _, (descriptor, token) = door.collect(HOST, 0, {"device": 2}, soon())
        assert isinstance(descriptor, Descriptor)
        with descriptor:
            assert os.readlink(f"/proc/self/fd/{descriptor.fd}").startswith("/memfd:of host")
        assert token == TOKEN
        assert door.collect_numbers("checksums", 0, 0, 3, soon()) == CHECKSUMS


# -- who takes their time ----------------------------------------------------------------------------------------------
def test_a_group_publishes_and_passes_among_the_slow_and_the_silent(place: Place) -> None:
    """Answered one after another, they would take longer than the deadline of publish."""
    model = random_model({number: {"w": ((6, 700), torch.float32)} for number in range(3)})
    knocking = threading.Event()
    knocked: list[socket.socket] = []
    place.door(0)

    def knock_and_say_nothing() -> None:
        while not knocking.is_set():
            for rank in 0, 1, 2:
                if len(knocked) < 60:
                    with contextlib.suppress(OSError):
                        knocked.append(place.connect(rank))
                        if len(knocked) % 2:
                            knocked[-1].send(framed(b"", nbytes=100))
            knocking.wait(0.001)

    crowd = threading.Thread(target=knock_and_say_nothing)
    crowd.start()
    try:
        with published(DWDPConfig(group_size=3), place.rendezvous, model) as runtimes:
            for runtime in runtimes:
                check_pass(runtime, model)
                assert all(runtime.peers().values())
        assert len(knocked) > 10
    finally:
        knocking.set()
        crowd.join()
        for sock in knocked:
            sock.close()


@pytest.mark.parametrize("at", [1, 2])
def test_a_connection_that_cannot_be_accepted_does_not_shut_the_door(place: Place, ledger: Ledger, at: int) -> None:
    """A process that is out of descriptors for a moment; who knocked is answered afterwards."""
    failing = FailingCalls("accept", at)
    with failing.installed(), serving(place, ledger):
        for _ in range(3):
            assert answer_to(place, request(place), ledger) == ALIVE
    assert failing.failed


def test_a_rank_that_accepts_nobody_does_not_hold_up_others(place: Place, ledger: Ledger) -> None:
    """A stopped process: the kernel takes connections for it until its queue is full, and then makes callers wait."""
    door = exchange(place.door(1), ledger, 1)
    with place.listener(0, backlog=0), place.connect(0):
        assert not door.alive(0, soon())
        with pytest.raises(ExchangeError, match="rank 0 takes no connections"):
            door.collect(0, 0, {"device": 1}, time.monotonic() + 0.1)


# -- what is handed out ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("owner", [0, 1, HOST])
def test_what_is_another_rank_s_cannot_be_written(place: Place, owner: Any) -> None:
    """Not by a stray store of the process either: it ends by a signal. Owners 0 and HOST are those of rank 0 itself."""
    model = random_model({0: {"w": ((9, 1500), torch.float32)}})
    config = DWDPConfig(group_size=GROUP_SIZE, host_experts=3, mode="in_place")
    with published(config, place.rendezvous, model) as runtimes:
        for rank, runtime in enumerate(runtimes):
            killer = 0 if owner == rank else signal.SIGSEGV
            assert writing_kills(runtime._assembly.shard(runtime._layers.in_order[0], "w", owner)) == killer
            assert writing_kills(runtime.acquire(0, mode="in_place")["w"]) == signal.SIGSEGV
            runtime.release(0)


def writing_kills(tensor: Any) -> int:
    """The signal that ends a child process which writes the first byte of ``tensor``, or 0."""
    child = os.fork()
    if not child:
        faulthandler.disable()
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        ctypes.memset(tensor.data_ptr(), 0, 1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
