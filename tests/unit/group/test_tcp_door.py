"""Who is let in over TCP: who proves on this very connection, to this very rank, that it knows the secret."""

from __future__ import annotations

import contextlib
import errno
import hmac
import json
import secrets
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from support.doors import (
    CHECKSUMS,
    GROUP,
    PATIENCE,
    SECRET,
    TOKEN,
    TCPPlace,
    answer_to,
    exchange,
    free_address,
    request,
    serving,
    soon,
)

from vmm_dwdp import ExchangeError, TCPRendezvous
from vmm_dwdp.allocator.handles import Ledger
from vmm_dwdp.allocator.sharing import MAGIC, receive, send
from vmm_dwdp.group import tcp_door
from vmm_dwdp.group.door import MAX_REQUEST_NBYTES
from vmm_dwdp.group.exchange import Exchange
from vmm_dwdp.group.tcp_door import NONCE_NBYTES, PROOF_NBYTES

HEADER = struct.Struct("!4sII")
pytestmark = pytest.mark.usefixtures("open_descriptors")


def framed(payload: bytes, magic: bytes = MAGIC, fds: int = 0, nbytes: int | None = None) -> bytes:
    return HEADER.pack(magic, fds, len(payload) if nbytes is None else nbytes) + payload


def key_of(secret: bytes, addresses: list[str]) -> bytes:
    """As the note says, made here anew."""
    return hmac.new(secret, json.dumps(["vmm-dwdp", *addresses]).encode(), "sha256").digest()


def proof(key: bytes, nonces: bytes, rank: int, payload: bytes, asked: bytes | None = None) -> bytes:
    """Of an asker; or, to somebody who has ``asked``, of the rank."""
    direction = b"asks" if asked is None else b"told"
    return hmac.new(
        key, direction + nonces + struct.pack("!I", rank) + (asked or bytes(32)) + payload, "sha256"
    ).digest()


def nonce_from(sock: socket.socket) -> bytes:
    nonce, _ = receive(sock, max_bytes=NONCE_NBYTES, max_fds=0, deadline=soon(), ledger=Ledger())
    return nonce


def ends_without_an_answer(sock: socket.socket) -> bool:
    sock.settimeout(60)
    try:
        return sock.recv(1) == b""
    except ConnectionResetError:  # there was more to read for the other end
        return True


def asked(place: TCPPlace, nonce: bytes, secret: bytes = SECRET, rank: int = 0, **changes: object) -> bytes:
    """What rank 1 sends to a door that said ``nonce``."""
    own, payload = secrets.token_bytes(NONCE_NBYTES), json.dumps(request(place, **changes)).encode()
    return own + proof(key_of(secret, place.addresses), nonce + own, rank, payload) + payload


# -- who asks ----------------------------------------------------------------------------------------------------------
def test_what_the_note_says_is_what_is_done(tcp: TCPPlace, ledger: Ledger) -> None:
    """Both proofs, by an implementation of the test's own."""
    key, payload = key_of(SECRET, tcp.addresses), json.dumps(request(tcp)).encode()
    with serving(tcp, ledger), tcp.connect(0) as sock:
        nonces = nonce_from(sock) + bytes(range(NONCE_NBYTES))
        own = proof(key, nonces, 0, payload)
        send(sock, nonces[NONCE_NBYTES:] + own + payload, deadline=soon())
        told, _ = receive(sock, max_bytes=1 << 16, max_fds=0, deadline=soon(), ledger=ledger)
    answer = told[PROOF_NBYTES:]
    assert json.loads(answer) == {"error": None, "group": GROUP, "asleep": False, "settled": None}
    assert told[:PROOF_NBYTES] == proof(key, nonces, 0, answer, asked=own)


STRANGERS: dict[str, Callable[[TCPPlace, bytes], bytes]] = {
    "nothing": lambda place, nonce: b"",
    "another program": lambda place, nonce: b"GET / HTTP/1.1\r\n\r\n",
    "another format": lambda place, nonce: framed(asked(place, nonce), magic=b"VMD2"),
    "gigabytes": lambda place, nonce: framed(b"", nbytes=(1 << 32) - 1),
    "too long": lambda place, nonce: framed(bytes(NONCE_NBYTES + PROOF_NBYTES + MAX_REQUEST_NBYTES + 1)),
    "cut short": lambda place, nonce: framed(asked(place, nonce)[:-1], nbytes=len(asked(place, nonce))),
    "descriptors announced": lambda place, nonce: framed(asked(place, nonce), fds=1),
    "no message": lambda place, nonce: framed(b""),
    "no proof": lambda place, nonce: framed(bytes(NONCE_NBYTES) + json.dumps(request(place)).encode()),
    "half a proof": lambda place, nonce: framed(asked(place, nonce)[: NONCE_NBYTES + PROOF_NBYTES // 2]),
    "zeros": lambda place, nonce: framed(bytes(NONCE_NBYTES + PROOF_NBYTES)),
    "the secret itself": lambda place, nonce: framed(bytes(NONCE_NBYTES) + SECRET.ljust(PROOF_NBYTES, b"\0") + b"{}"),
    "another secret": lambda place, nonce: framed(asked(place, nonce, secret=b"another secret, as long")),
    "for another connection": lambda place, nonce: framed(asked(place, bytes(NONCE_NBYTES))),
    "for another rank": lambda place, nonce: framed(asked(place, nonce, rank=2)),
    "changed on the way": lambda place, nonce: framed(asked(place, nonce).replace(b'"alive"', b'"bound"')),
    "not JSON, by a member": lambda place, nonce: framed(place_message(place, nonce, b"{")),
    "nested, by a member": lambda place, nonce: framed(place_message(place, nonce, b"[" * 4000)),
    "not an object, by a member": lambda place, nonce: framed(place_message(place, nonce, b"[1]")),
    "nothing, by a member": lambda place, nonce: framed(place_message(place, nonce, b"")),
}


def place_message(place: TCPPlace, nonce: bytes, payload: bytes) -> bytes:
    own = bytes(NONCE_NBYTES)
    return own + proof(key_of(SECRET, place.addresses), nonce + own, 0, payload) + payload


@pytest.mark.parametrize("stranger", STRANGERS)
def test_a_stranger_is_not_answered_and_costs_nobody_anything(tcp: TCPPlace, ledger: Ledger, stranger: str) -> None:
    with serving(tcp, ledger):
        with tcp.connect(0) as sock:
            nonce = nonce_from(sock)
            with contextlib.suppress(OSError):
                sock.sendall(STRANGERS[stranger](tcp, nonce))
                sock.shutdown(socket.SHUT_WR)
            assert ends_without_an_answer(sock)
        assert answer_to(tcp, request(tcp), ledger) == {"error": None, "group": GROUP, "asleep": False, "settled": None}


def test_what_was_heard_on_the_wire_opens_no_door_again(tcp: TCPPlace, ledger: Ledger) -> None:
    """Neither at the rank it was said to, nor at another, nor at the one that said it; and it has no secret in it."""
    with serving(tcp, ledger), serving(tcp, ledger, 2) as other, listening_in(tcp, ledger, 1) as (door, heard):
        assert door.collect(0, 0, {"device": 1}, soon()) == ("device", [TOKEN])
        assert other.alive(1, soon())
        for rank in 0, 1, 2:
            for said in list(heard):
                with tcp.connect(rank) as sock:
                    nonce_from(sock)
                    send(sock, said, deadline=soon())
                    assert ends_without_an_answer(sock)
    key = key_of(SECRET, tcp.addresses)
    assert len(heard) == 2
    assert not any(
        known in said for said in heard for known in (SECRET, SECRET.hex().encode(), key, key.hex().encode())
    )


@contextmanager
def listening_in(place: TCPPlace, ledger: Ledger, rank: int) -> Iterator[tuple[Exchange, list[bytes]]]:
    """A rank that is there, and all messages that it sends as it asks."""
    heard: list[bytes] = []

    def overheard(sock: socket.socket, payload: bytes, fds: object = (), *, deadline: float) -> None:
        if threading.current_thread() is threading.main_thread():
            heard.append(payload)
        send(sock, payload, deadline=deadline)

    with pytest.MonkeyPatch.context() as patched, serving(place, ledger, rank) as door:
        patched.setattr(tcp_door, "send", overheard)
        yield door, heard


def test_the_silent_are_dropped_long_before_a_member_would_be(
    tcp: TCPPlace, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tcp_door.TCPDoor, "stranger_seconds", 0.05)
    with serving(tcp, ledger), tcp.connect(0) as sock:
        nonce_from(sock)
        assert ends_without_an_answer(sock)
    assert PATIENCE > 1


def test_a_rank_listens_at_its_own_address_only(tcp: TCPPlace, ledger: Ledger) -> None:
    port = int(tcp.addresses[0].split(":")[1])
    with serving(tcp, ledger), socket.socket() as sock:
        assert sock.connect_ex(("127.0.0.2", port)) == 0
        for elsewhere in "127.0.0.1", "127.0.0.77":
            with socket.socket() as other, pytest.raises(ConnectionRefusedError):
                other.connect((elsewhere, port))


def test_an_address_that_is_not_this_host_s(tcp: TCPPlace, ledger: Ledger) -> None:
    tcp.addresses[0] = "192.0.2.1:29600"  # of a network that is in books only
    tcp.rendezvous = TCPRendezvous(tcp.addresses, secret_file=tcp.secret_file)
    door = exchange(tcp.door(0), ledger, 0)
    with pytest.raises(ExchangeError, match=r"rank 0 cannot listen at 192\.0\.2\.1:29600: Cannot assign requested"):
        door.serve(soon())
    door.close()


# -- who answers -------------------------------------------------------------------------------------------------------
def another(place: TCPPlace, secret: bytes = SECRET, swap: bool = False) -> TCPPlace:
    """The same addresses with another secret, or with two of the ranks in each other's place."""
    made = object.__new__(TCPPlace)
    made.secret_file = place.secret_file.with_name("another")
    made.secret_file.touch(mode=0o600)
    made.secret_file.write_bytes(secret)
    made.addresses = [place.addresses[0], *place.addresses[:0:-1]] if swap else place.addresses
    made.rendezvous = TCPRendezvous(made.addresses, secret_file=made.secret_file)
    return made


@pytest.mark.parametrize("difference", ["secret", "addresses"])
def test_ranks_that_know_different_things_are_told_so(tcp: TCPPlace, ledger: Ledger, difference: str) -> None:
    """On both sides: the one that knocks, and the one that waits for it in vain."""
    other = another(tcp, b"another secret, as long") if difference == "secret" else another(tcp, swap=True)
    with serving(tcp, ledger) as door:
        wrong = exchange(other.door(1), ledger, 1)
        with pytest.raises(
            ExchangeError,
            match=r"asking rank 0 for 'shares': .*: it was ended, or knows another secret or other addresses",
        ):
            wrong.collect(0, 0, {"device": 1}, soon())
        with pytest.raises(
            ExchangeError,
            match=r"rank 1 did not come: nobody listens at .*; but a process came that knows another secret",
        ):
            door.collect(1, 1, {"device": 1}, time.monotonic())


@contextmanager
def answering(place: TCPPlace, answer: Callable[[bytes, bytes], bytes | None]) -> Iterator[None]:
    """Somebody in the place of rank 0 who gives a nonce of zeros, and to what it is sent an answer of its own."""
    with place.listener(0, backlog=1) as listener:

        def reply() -> None:
            client, _ = listener.accept()
            with client:
                send(client, bytes(NONCE_NBYTES), deadline=soon())
                message, _ = receive(client, max_bytes=1 << 16, max_fds=0, deadline=soon(), ledger=Ledger())
                told = answer(message[: NONCE_NBYTES + PROOF_NBYTES], message[NONCE_NBYTES + PROOF_NBYTES :])
                if told is not None:
                    send(client, told, deadline=soon())

        replying = threading.Thread(target=reply)
        replying.start()
        yield
        replying.join()


def told(key: bytes, rank: int = 0, asked_before: bytes | None = None) -> Callable[[bytes, bytes], bytes]:
    """An answer with a proof by ``key``, as rank ``rank``, to another question if so it is."""
    payload = json.dumps({"error": None, "numbers": CHECKSUMS}).encode()

    def answer(head: bytes, request: bytes) -> bytes:
        nonces, own = bytes(NONCE_NBYTES) + head[:NONCE_NBYTES], head[NONCE_NBYTES:]
        return proof(key, nonces, rank, payload, asked=asked_before or own) + payload

    return answer


def test_a_proof_lets_an_answer_in(tcp: TCPPlace, ledger: Ledger) -> None:
    """So that the tests below refuse for the reason they name."""
    with answering(tcp, told(key_of(SECRET, tcp.addresses))):
        assert exchange(tcp.door(1), ledger, 1).collect_numbers("checksums", 0, 0, 3, soon()) == CHECKSUMS


def test_an_answer_without_a_proof_of_its_own_is_refused(tcp: TCPPlace, ledger: Ledger) -> None:
    key = key_of(SECRET, tcp.addresses)
    unproved: list[Callable[[bytes, bytes], bytes]] = [
        lambda head, request: b"",
        lambda head, request: bytes(PROOF_NBYTES) + b'{"error": null}',
        lambda head, request: head[NONCE_NBYTES:] + request,  # reflected
        told(key_of(b"another secret, as long", tcp.addresses)),
        told(key, rank=2),
        told(key, asked_before=bytes(range(PROOF_NBYTES))),  # replayed
        told(key_of(SECRET, [])),
    ]
    for answer in unproved:
        with (
            answering(tcp, answer),
            pytest.raises(ExchangeError, match="its answer does not prove that it knows the secret"),
        ):
            exchange(tcp.door(1), ledger, 1).collect_numbers("checksums", 0, 0, 3, soon())


def test_a_rank_that_asks_itself_by_another_s_address_is_refused(tcp: TCPPlace, ledger: Ledger) -> None:
    """Somebody in the middle leads a rank's connection back to the rank: what it asks another is no question to it."""
    with serving(tcp, ledger, 1) as door:
        door._transport._door._addresses = (tcp.addresses[1], *tcp.addresses[1:])
        with pytest.raises(ExchangeError, match="knows another secret or other addresses"):
            door.collect(0, 0, {"device": 1}, soon())


def test_another_program_that_listens_there(tcp: TCPPlace, ledger: Ledger) -> None:
    with tcp.listener(0, backlog=1) as listener:

        def greet() -> None:
            client, _ = listener.accept()
            with client:
                client.sendall(b"SSH-2.0-OpenSSH_9.9\r\n")

        greeting = threading.Thread(target=greet)
        greeting.start()
        with pytest.raises(ExchangeError, match=r"asking rank 0 for 'shares': a message begins with b'SSH-'"):
            exchange(tcp.door(1), ledger, 1).collect(0, 0, {"device": 1}, soon())
        greeting.join()


# -- who is not heard of -----------------------------------------------------------------------------------------------
def test_a_host_that_neither_takes_nor_refuses_is_waited_for_until_the_deadline(tcp: TCPPlace, ledger: Ledger) -> None:
    """A queue that is full: the kernel drops what asks for a connection, as a host that is gone does."""
    door = exchange(tcp.door(1), ledger, 1)
    with tcp.listener(0, backlog=0), tcp.connect(0):
        begin = time.monotonic()
        with pytest.raises(ExchangeError, match=r"rank 0 takes no connections at .* \(its host is gone, packets are"):
            door.collect(0, 0, {"device": 1}, begin + 0.5)
        assert time.monotonic() >= begin + 0.5
        assert door.listens(0), "nobody can tell"
        assert not door.alive(0, time.monotonic() + 0.1)
        with (
            serving(tcp, ledger, 2),
            pytest.raises(ExchangeError, match="rank 0 takes no connections"),
            door.attempt("update", "together", time.monotonic() + 0.5),
        ):
            pass


def test_who_takes_a_connection_and_says_nothing_is_waited_for_until_the_deadline(
    tcp: TCPPlace, ledger: Ledger
) -> None:
    with tcp.listener(0, backlog=1), pytest.raises(ExchangeError, match="the peer did not send a message in time"):
        exchange(tcp.door(1), ledger, 1).collect(0, 0, {"device": 1}, time.monotonic() + 0.2)


@pytest.mark.parametrize("code", ["EHOSTUNREACH", "ENETUNREACH", "ETIMEDOUT"])
def test_a_network_that_has_no_way_there_may_get_one(
    tcp: TCPPlace, ledger: Ledger, monkeypatch: pytest.MonkeyPatch, code: str
) -> None:
    """A rank waits for it until the deadline, and does not take the other for one that has left."""

    def unreachable(sock: socket.socket, deadline: float) -> None:
        tried.append(code)
        raise OSError(getattr(errno, code), "no way there")

    tried: list[str] = []
    monkeypatch.setattr(tcp_door, "_await_connection", unreachable)
    door = exchange(tcp.door(1), ledger, 1)
    with pytest.raises(ExchangeError, match=r"rank 0 takes no connections at .*: no way there"):
        door.collect(0, 0, {"device": 1}, time.monotonic() + 0.1)
    assert len(tried) > 1
    assert door.listens(0)


def test_a_socket_that_is_connected_to_itself_is_nobody(
    tcp: TCPPlace, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel may choose the very port that is asked for as one's own."""

    class Unlucky(socket.socket):
        def connect(self, address: tuple[str, int]) -> None:  # type: ignore[override]
            self.bind(address)
            connected.append(address)
            super().connect(address)

    connected: list[object] = []
    door = exchange(tcp.door(1), ledger, 1)
    with monkeypatch.context() as patched:
        patched.setattr(socket, "socket", Unlucky)
        assert not door.listens(0)
        with pytest.raises(ExchangeError, match="rank 0 did not come: nobody listens at"):
            door.collect(0, 0, {"device": 1}, time.monotonic())
    assert len(connected) == 2
    with serving(tcp, ledger):  # whose port it still is
        assert door.listens(0)


def test_a_child_of_fork_does_not_keep_the_port(tcp: TCPPlace) -> None:
    """Of a process group's rank, which has it before it listens."""
    door = tcp.door(0)
    door._bound = tcp_door.bind(free_address("127.0.0.1"))
    door.forget()
    assert door._bound is None
