"""In what ranks say to each other."""

from __future__ import annotations

from typing import Final

from mutants.seeded import Bug

_BYTES = ("tests/property/test_assembled_bytes.py",)
_DOOR = ("tests/unit/group/test_door.py",)
_TCP = ("tests/unit/group/test_tcp_door.py",)
_RENDEZVOUS = ("tests/unit/group/test_rendezvous.py",)
_UPDATE = ("tests/multiprocess/test_update.py",)
_SOCKETS = ("tests/unit/group/test_socket_failures.py",)
_AGREEMENT = ("tests/unit/group/test_agreement_protocol.py",)
_AGAIN = ("tests/multiprocess/test_update_again.py",)
_UPDATING = ("tests/multiprocess/test_updating.py",)

BUGS: Final = (
    Bug(
        "the edges are not filled",
        "vmm_dwdp/group/membership.py",
        """            self._assembly.build()
            self._fill_edges()
""",
        "            self._assembly.build()\n",
        _BYTES,
    ),
    Bug(
        "the edges keep old bytes in an update",
        "vmm_dwdp/group/membership.py",
        "                self._fill_edges()\n                for owner in",
        "                for owner in",
        _UPDATE,
    ),
    Bug(
        "a checksum that differs is passed over",
        "vmm_dwdp/group/membership.py",
        "if self._sum(layer, weight, owner) != expected:",
        "if not self._sum(layer, weight, owner):",
        _UPDATE,
    ),
    Bug(
        "two configs that differ count as equal",
        "vmm_dwdp/group/membership.py",
        "config = dataclasses.asdict(self._stated)",
        "config = self._stated.group_size",
        ("tests/multiprocess/test_group.py::test_ranks_with_different_configs_are_refused",),
    ),
    Bug(
        "descriptors of a wrong answer stay open",
        "vmm_dwdp/group/exchange.py",
        """        except ExchangeError:
            close_shares(descriptors)
            raise
""",
        """        except ExchangeError:
            raise
""",
        _DOOR,
    ),
    Bug(
        "the group may enter the rendezvous directory",
        "vmm_dwdp/group/rendezvous.py",
        "if found.st_mode & 0o077:",
        "if found.st_mode & 0o007:",
        _RENDEZVOUS,
    ),
    Bug(
        "any token will do",
        "vmm_dwdp/group/unix_door.py",
        "if request is not None and hmac.compare_digest(token, self.rendezvous.token):",
        "if request is not None and token:",
        _DOOR,
    ),
    Bug(
        "other users are answered",
        "vmm_dwdp/group/unix_door.py",
        "        if peer_uid(client) != os.getuid():\n            return None\n",
        "",
        _DOOR,
    ),
    Bug(
        "two processes may take the place of one rank",
        "vmm_dwdp/group/unix_door.py",
        "            with self.rendezvous.locked(deadline):",
        "            with contextlib.nullcontext():",
        _DOOR,
    ),
    Bug(
        "a rank that is too busy to answer has left",
        "vmm_dwdp/group/transport.py",
        "        except Silent:\n            return True\n",
        "        except Silent:\n            return False\n",
        _DOOR,
    ),
    Bug(
        "one client after another is answered",
        "vmm_dwdp/group/transport.py",
        "                self._start(self._answer, client)\n",
        "                self._answer(client)\n                client.close()\n",
        ("tests/unit/group/test_door.py::test_a_group_publishes_and_passes_among_the_slow_and_the_silent",),
    ),
    Bug(
        "one accept that fails shuts the door",
        "vmm_dwdp/group/transport.py",
        "                if error.errno == errno.EINVAL:\n",
        "                if error.errno:\n",
        _DOOR,
    ),
    Bug(
        "a socket that could not be listened at stays in the directory",
        "vmm_dwdp/group/unix_door.py",
        "                    made.unlink(missing_ok=True)\n",
        "                    made.exists()\n",
        _SOCKETS,
    ),
    Bug(
        "a proof of the secret is not looked at",
        "vmm_dwdp/group/tcp_door.py",
        "        if not hmac.compare_digest(proof, conversation.asks(payload)):\n",
        "        if not proof:\n",
        _TCP,
    ),
    Bug(
        "an answer needs no proof",
        "vmm_dwdp/group/tcp_door.py",
        "        if not hmac.compare_digest(told[:PROOF_NBYTES], conversation.told(proof, told[PROOF_NBYTES:])):\n",
        "        if not told:\n",
        _TCP,
    ),
    Bug(
        "a proof is good for any rank",
        "vmm_dwdp/group/tcp_door.py",
        "direction + self.nonces + _RANK.pack(self.answerer) + before",
        "direction + self.nonces + before",
        _TCP,
    ),
    Bug(
        "a proof is good for any connection that the asker makes",
        "vmm_dwdp/group/tcp_door.py",
        "Conversation(self._key, self._rank, nonce + message[:NONCE_NBYTES])",
        "Conversation(self._key, self._rank, bytes(NONCE_NBYTES) + message[:NONCE_NBYTES])",
        _TCP,
    ),
    Bug(
        "groups with one secret are one",
        "vmm_dwdp/group/tcp_door.py",
        'json.dumps(["vmm-dwdp", *meeting.addresses])',
        'json.dumps(["vmm-dwdp"])',
        _TCP,
    ),
    Bug(
        "a secret may be read by others",
        "vmm_dwdp/group/addresses.py",
        "    if found.st_mode & 0o077:\n",
        "    if found.st_mode & 0o007:\n",
        ("tests/unit/group/test_addresses.py",),
    ),
    Bug(
        "a host that is not heard of has left",
        "vmm_dwdp/group/tcp_door.py",
        "        if error.errno in _NOT_HEARD_OF:\n",
        "        if not error.errno:\n",
        _TCP,
    ),
    Bug(
        "a connection to itself is one to another rank",
        "vmm_dwdp/group/tcp_door.py",
        "if sock.getsockname() == sock.getpeername():",
        "if not sock.getsockname():",
        _TCP,
    ),
    Bug(
        "a fabric handle of the host dies with the process that made it",
        "allocator/host_fabric.py",
        'for path in (f"/proc/{process}/fd/{fd}", *_descriptors()):',
        'for path in (f"/proc/{process}/fd/{fd}",):',
        ("tests/unit/allocator/test_host_fabric.py",),
    ),
    Bug(
        "a token's sum comes from a node that has none of its experts",
        "vmm_dwdp/nodes/rail.py",
        "owner = torch.bucketize(chosen, starts[1:], right=True)",
        "owner = torch.bucketize(chosen, starts[1:])",
        ("tests/multiprocess/test_rails.py",),
    ),
    Bug(
        "an earlier entry of a rank counts when it comes last",
        "vmm_dwdp/group/agreement.py",
        "self._move_to(tuple(map(max, self.vector, vector)))",
        "self._move_to((*vector[: self._rank], own, *vector[self._rank + 1 :]))",
        _AGREEMENT,
    ),
    Bug(
        "a name is committed with the promises that were made to another",
        "vmm_dwdp/group/agreement.py",
        "            self._accepted = self._refused = frozenset()\n            self.vector = vector",
        "            self._refused = frozenset()\n            self.vector = vector",
        _AGREEMENT,
    ),
    Bug(
        "a step of any attempt counts",
        "vmm_dwdp/group/agreement.py",
        "self._heard |= {(word.vector, word.step, rank)}",
        "self._heard |= {(self.committed or word.vector, word.step, rank)}",
        (
            "tests/unit/group/test_agreement_protocol.py::test_a_step_of_an_attempt_that_was_overtaken_is_none_of_the_next",
        ),
    ),
    Bug(
        "to be bound is no doubt",
        "vmm_dwdp/group/agreement.py",
        "            if counts:\n                self._doubt()\n",
        "            if counts:\n",
        _AGREEMENT,
    ),
    Bug(
        "a rank that has committed binds itself to another name",
        "vmm_dwdp/group/agreement.py",
        " and self.committed in (None, word.vector)",
        "",
        _AGREEMENT,
    ),
    Bug(
        "a rank that comes back does not hear of the doubt of others",
        "vmm_dwdp/group/agreement.py",
        "if not self._under_way and answer.doubt is not None:",
        "if self._under_way and answer.doubt is not None:",
        _AGREEMENT,
    ),
    Bug(
        "one that does not tell has no doubt",
        "vmm_dwdp/group/agreement.py",
        """        self._audience -= {rank}
        self.doubt = """,
        """        self._audience -= {rank}
        _ = """,
        _AGAIN,
    ),
    Bug(
        "an update need not have what the one before left half written",
        "vmm_dwdp/group/update.py",
        "        self.begun.add((layer.number, weight, owner))\n",
        "",
        _AGAIN,
    ),
    Bug(
        "one expert of a half-written shard stands for all",
        "vmm_dwdp/group/update.py",
        "            >= set(self._shards",
        "            & set(self._shards",
        _UPDATING,
    ),
    Bug(
        "an expert is written to the place of the first",
        "vmm_dwdp/group/update.py",
        "                first = experts.start - held.start\n",
        "                first = 0\n",
        _UPDATING,
    ),
    Bug(
        "an update that is over takes more",
        "vmm_dwdp/group/update.py",
        "        self._is_over = True\n",
        "        pass\n",
        _UPDATING,
    ),
    Bug(
        "what was closed in the middle of an update is written to",
        "vmm_dwdp/memory/assembly.py",
        "            self._stopped = True\n",
        "            pass\n",
        _UPDATING,
    ),
    Bug(
        "two revisions that differ count as equal",
        "vmm_dwdp/group/exchange.py",
        "hashlib.sha256(revision.encode()).hexdigest()",
        "hashlib.sha256().hexdigest()",
        _AGAIN,
    ),
    Bug(
        "who begins anew is given shares for the attempt before",
        "vmm_dwdp/group/agreement.py",
        "return name in self._bound",
        "return True",
        _DOOR,
    ),
    Bug(
        "a rank that is late finds no directory",
        "vmm_dwdp/group/rendezvous.py",
        "if not self._temporary or time.monotonic() > deadline:",
        "if self._temporary or time.monotonic() > deadline:",
        _RENDEZVOUS,
    ),
    Bug(
        "the first to leave takes the token along",
        "vmm_dwdp/group/rendezvous.py",
        "if presence.alone() and presence.is_at(self._token_path):",
        "if presence.is_at(self._token_path):",
        _RENDEZVOUS,
    ),
    Bug(
        "who leaves removes the socket of its successor",
        "vmm_dwdp/group/rendezvous.py",
        "if self._socket is not None and _is_same(*self._socket):",
        "if self._socket is not None:",
        _RENDEZVOUS,
    ),
    Bug(
        "descriptors that another awaits are not counted",
        "vmm_dwdp/group/limits.py",
        " + sum(_reserved.values()) + count",
        " + count",
        ("tests/unit/group/test_limits.py",),
    ),
    Bug(
        "the soft limit stays raised",
        "vmm_dwdp/group/limits.py",
        "            if soft == after:",
        "            if soft != after:",
        ("tests/unit/group/test_limits.py",),
    ),
    Bug(
        "to begin another attempt is to be in doubt no more",
        "vmm_dwdp/group/agreement.py",
        "        self.relied = False\n        self._enter(nonce)",
        "        self.relied, self.doubt = False, None\n        self._enter(nonce)",
        ("tests/unit/group/test_agreement_protocol.py::test_every_word_late_lost_or_the_last",),
    ),
    Bug(
        "what a half-done update has begun need not be in the next",
        "vmm_dwdp/group/membership.py",
        "        if self.half_updated is None:\n            self.shards.begun.clear()\n",
        "        self.shards.begun.clear()\n",
        ("tests/multiprocess/test_update_again.py::test_an_update_covers_what_the_one_before_left_half_written",),
    ),
    Bug(
        "whatever revision ranks state, they share",
        "vmm_dwdp/group/exchange.py",
        'and request.get("revision") != self._revision:',
        'and request.get("revision") == id(self._revision):',
        ("tests/multiprocess/test_update_again.py::test_ranks_that_were_given_different_checkpoints_are_all_refused",),
    ),
    Bug(
        "a forked child keeps its parent's token locked",
        "vmm_dwdp/group/rendezvous.py",
        "    for opened in list(_opened):\n        opened.close()\n",
        "    pass\n",
        _RENDEZVOUS,
    ),
    Bug(
        "descriptors are looked for and not reserved",
        "vmm_dwdp/group/limits.py",
        "            _reserved[self] = count\n",
        "            _reserved[self] = 0\n",
        ("tests/unit/group/test_limits.py",),
    ),
    Bug(
        "what ranks hand over is not counted among the descriptors",
        "vmm_dwdp/group/membership.py",
        "received + len(self._others) * held if",
        "received if",
        ("tests/unit/test_runtime_states.py::test_more_shares_than_a_process_can_have_files",),
    ),
)
