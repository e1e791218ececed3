"""Bugs of the kinds that this project can have, each with the narrowest tests that must find it."""

from __future__ import annotations

from typing import Final, NamedTuple


class Bug(NamedTuple):
    """What to put in the place of ``old``, which occurs once in ``file``; ``tests`` as pytest takes them."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


_EVENTS = ("tests/unit/schedule/test_event_protocol.py",)
_NATIVE = ("tests/unit/allocator/test_native_issue.py", "tests/unit/allocator/test_native_sanitized.py")
_PLANS = ("tests/property/test_placement_and_layout.py",)
_BYTES = ("tests/property/test_assembled_bytes.py",)
_HANDLES = ("tests/unit/allocator/test_handles.py",)
_DOOR = ("tests/unit/group/test_door.py",)
_RENDEZVOUS = ("tests/unit/group/test_rendezvous.py",)
_SHARING = ("tests/unit/allocator/test_sharing.py",)
_UPDATE = ("tests/multiprocess/test_update.py",)
_STATES = ("tests/unit/test_runtime_states.py",)
_SOCKETS = ("tests/unit/group/test_socket_failures.py",)
_CACHE = ("tests/property/test_resident_cache.py",)
_FAILURES = ("tests/unit/test_failures.py",)
_AGREEMENT = ("tests/unit/group/test_agreement_protocol.py",)
_AGAIN = ("tests/multiprocess/test_update_again.py",)
_INTERRUPTS = ("tests/property/test_interrupts.py::test_acquire_and_release_by_signals",)
_CLOSING = ("tests/unit/test_closing.py",)
_TURN = ("tests/unit/test_threads_and_forks.py",)
_UNINTERRUPTED = ("tests/unit/allocator/test_uninterrupted.py",)
_CURRENT = ("tests/unit/allocator/test_current_device.py",)
_CONTEXT = ("tests/unit/allocator/test_cuda_context.py",)
_HIT_PATH = ("tests/unit/schedule/test_hit_path.py",)
_SPREAD = ("tests/unit/integrations/test_spread_tensor.py",)

BUGS: Final = (
    Bug(
        "copies wait for the event of another slot",
        "vmm_dwdp/schedule/staging.py",
        "Lane(stream.stream, slot.consumed.event, copies, ready.event)",
        "Lane(stream.stream, self.slots[0].consumed.event, copies, ready.event)",
        _EVENTS,
    ),
    Bug(
        "ready is recorded before the copies",
        "vmm_dwdp/schedule/layer.py",
        """            self._driver.copy(lane.copies, lane.stream)
            self._driver.record(lane.then, lane.stream)
""",
        """            self._driver.record(lane.then, lane.stream)
            self._driver.copy(lane.copies, lane.stream)
""",
        _EVENTS,
    ),
    Bug(
        "the native thread goes on after a batch that the driver refused",
        "allocator/_issue_thread.c",
        """                return "cuMemcpyBatchAsync";
""",
        """                continue;
""",
        _NATIVE,
    ),
    Bug(
        "a job that the native thread is at can be freed",
        "allocator/_issue.c",
        """    await(self->owner, &self->job);
    for""",
        "    for",
        _NATIVE,
    ),
    Bug(
        "a native thread that sleeps is not woken",
        "allocator/_issue_thread.c",
        "if (!__atomic_load_n(&issuer->asleep, __ATOMIC_SEQ_CST))",
        "if (1)",
        ("tests/unit/allocator/test_native_issue.py::test_submit_does_not_wait",),
    ),
    Bug(
        "copies are given by the native thread while a trace is recorded",
        "vmm_dwdp/schedule/layer.py",
        "        if pipeline.tracer is None:\n",
        "        if True:\n",
        ("tests/unit/schedule/test_copy_path.py",),
    ),
    Bug(
        "what a job's addresses point into is not kept",
        "allocator/_issue.c",
        "made->kept = Py_NewRef(kept);",
        "made->kept = Py_NewRef(Py_None);",
        _NATIVE,
    ),
    Bug(
        "a refused job of the native thread counts as done",
        "allocator/_issue_thread.c",
        "call ? FAILED : DONE",
        "DONE",
        _NATIVE,
    ),
    Bug(
        "of two jobs that are submitted at once the later is done first",
        "allocator/_issue_thread.c",
        """            Job *earlier = latest->next;
            latest->next = issuer->first;
            issuer->first = latest;
            latest = earlier;
""",
        """            issuer->first = latest;
            latest = NULL;
""",
        _NATIVE,
    ),
    Bug(
        "a job that comes while the native thread falls asleep waits for the next",
        "allocator/_issue_thread.c",
        "            if (!has_work(issuer))\n                pthread_cond_wait",
        "                pthread_cond_wait",
        _NATIVE,
    ),
    Bug(
        "acquire does not wait for the thread that issues copies",
        "vmm_dwdp/schedule/layer.py",
        "        if slot.ticket is not None and not slot.ticket.done:\n",
        "        if False:\n",
        _EVENTS,
    ),
    Bug(
        "release does not record that the slot was read",
        "vmm_dwdp/schedule/layer.py",
        """        self._driver.record(slot.consumed.event, stream)
        if pipeline.tracer""",
        "        if pipeline.tracer",
        _EVENTS,
    ),
    Bug(
        "the end of a pass fetches the first layer into every slot",
        "vmm_dwdp/schedule/staging.py",
        "if place + depth < len(fetches) else place % depth]",
        "if place + depth < len(fetches) else 0]",
        _EVENTS,
    ),
    Bug(
        "a slot that nobody read is overwritten at once",
        "vmm_dwdp/schedule/layer.py",
        "        elif not slot.read:\n",
        "        elif False:\n",
        _EVENTS,
    ),
    Bug(
        "an abandoned layer is still acquired after reset",
        "vmm_dwdp/schedule/in_place.py",
        "            layer.read_in_place = False\n",
        "            pass\n",
        _STATES,
    ),
    Bug(
        "a copy is one page short",
        "vmm_dwdp/memory/assembly.py",
        "                len(run),\n",
        "                max(1, len(run) - 4096),\n",
        _BYTES,
    ),
    Bug(
        "a copy begins at the reader's place among the owner's pages",
        "vmm_dwdp/memory/virtual.py",
        "        offset = byte - layer.layouts[weight].resident_bytes(owner).start\n        return self._views",
        "        offset = byte - layer.layouts[weight].resident_bytes(self.rank).start\n        return self._views",
        _BYTES,
    ),
    Bug(
        "two owners are swapped",
        "vmm_dwdp/layout/placement.py",
        "                    sources.append(Source(range(start, start + count), owner))\n",
        "                    sources.append(Source(range(start, start + count), max(share, key=str)))\n",
        _PLANS,
    ),
    Bug(
        "a resident span is rounded inward",
        "vmm_dwdp/layout/ranges.py",
        "return range(first, -(-shard.stop // self.granularity) if shard else first)",
        "return range(first, max(first, shard.stop // self.granularity))",
        _PLANS,
    ),
    Bug(
        "the last slice of a segment is forgotten",
        "vmm_dwdp/layout/copies.py",
        "        for start in range(run.start, run.stop, slice_bytes):\n",
        "        for start in range(run.start, max(run.start + 1, run.stop - slice_bytes), slice_bytes):\n",
        _PLANS,
    ),
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
        """                self._fill_edges()
                for owner in""",
        "                for owner in",
        _UPDATE,
    ),
    Bug(
        "slots keep old bytes in an update",
        "vmm_dwdp/schedule/staging.py",
        "            slot.holds = None\n",
        "            pass\n",
        _UPDATE,
    ),
    Bug(
        "a checksum that differs is passed over",
        "vmm_dwdp/group/membership.py",
        "if checksum(self._assembly.shard(layer, weight, owner)) != expected:",
        "if not checksum(self._assembly.shard(layer, weight, owner)):",
        _UPDATE,
    ),
    Bug(
        "the shards of a dead rank are handed over in another order",
        "vmm_dwdp/memory/assembly.py",
        "        self._received[owner] = list(shares)\n",
        "        self._received[owner] = list(reversed(shares))\n",
        ("tests/multiprocess/test_death_and_return.py",),
    ),
    Bug(
        "two configs that differ count as equal",
        "vmm_dwdp/group/membership.py",
        "config = dataclasses.asdict(self._config)",
        "config = self._config.group_size",
        ("tests/multiprocess/test_group.py::test_ranks_with_different_configs_are_refused",),
    ),
    Bug(
        "the return code of mprotect is not looked at",
        "allocator/host_pages.py",
        "    if _libc.mprotect(address, nbytes, access) != 0:\n",
        "    if _libc.mprotect(address, nbytes, access) > 0:\n",
        ("tests/unit/allocator/test_host_driver.py",),
    ),
    Bug(
        "resources are closed in the order in which they were made",
        "allocator/handles.py",
        "        for index in reversed(range(len(self._resources))):\n",
        "        for index in range(len(self._resources)):\n",
        _HANDLES,
    ),
    Bug(
        "a resource that could not be closed is forgotten",
        "allocator/handles.py",
        """            self._undo()
            self._ledger.remove(self._token)
            self._token = None
""",
        """            token, self._token = self._token, None
            self._ledger.remove(token)
            self._undo()
""",
        _HANDLES,
    ),
    Bug(
        "descriptors of half a message stay open",
        "allocator/sharing.py",
        """    except BaseException:
        _close_all(descriptors)
        raise
""",
        """    except BaseException:
        raise
""",
        _SHARING,
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
        "a message may be of any length",
        "allocator/sharing.py",
        "    if num_bytes > max_bytes:\n",
        "    if num_bytes < 0:\n",
        _SHARING,
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
        "vmm_dwdp/group/transport.py",
        "if hmac.compare_digest(token, self._rendezvous.token):",
        "if token:",
        _DOOR,
    ),
    Bug(
        "other users are answered",
        "vmm_dwdp/group/transport.py",
        "            if peer_uid(client) != os.getuid():\n                return\n",
        "",
        _DOOR,
    ),
    Bug(
        "peers may write",
        "vmm_dwdp/memory/virtual.py",
        "view = self._view(layer.layouts[weight], owner, tiles, Access.READ, label)",
        "view = self._view(layer.layouts[weight], owner, tiles, Access.READ_WRITE, label)",
        _DOOR,
    ),
    Bug(
        "two processes may take the place of one rank",
        "vmm_dwdp/group/transport.py",
        "            with self._rendezvous.locked(deadline):",
        "            with contextlib.nullcontext():",
        _DOOR,
    ),
    Bug(
        "a rank that is too busy to answer has left",
        "vmm_dwdp/group/transport.py",
        "        except _QueueFull:\n            return True\n",
        "        except _QueueFull:\n            return False\n",
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
        "vmm_dwdp/group/transport.py",
        "                    made.unlink(missing_ok=True)\n",
        "                    made.exists()\n",
        _SOCKETS,
    ),
    Bug(
        "the row after the one that was asked for is read",
        "vmm_dwdp/checkpoint.py",
        "whole[row : row + 1]",
        "whole[row + 1 : row + 2]",
        ("tests/unit/test_checkpoint.py",),
    ),
    Bug(
        "a page of the cache that is in use counts as free",
        "vmm_dwdp/memory/cache.py",
        "if page not in used]",
        "]",
        _CACHE,
    ),
    Bug(
        "pages of the cache are mapped before they are filled",
        "vmm_dwdp/memory/cache.py",
        "            self._fill(moves)\n",
        "",
        _CACHE,
    ),
    Bug(
        "the cache cuts a shared page at the next expert",
        "vmm_dwdp/layout/ranges.py",
        "        return tuple((expert, min(run.stop, stop) - max(run.start, first)) for expert, run in runs)",
        "        return tuple((expert, min(run.stop, stop) - run.start) for expert, run in runs)",
        _CACHE,
    ),
    Bug(
        "an update is made while a layer is read in place",
        "vmm_dwdp/schedule/schedule.py",
        "            self._in_place.require_idle()\n",
        "            pass\n",
        _UPDATE,
    ),
    Bug(
        "the cache keeps old bytes after an update",
        "vmm_dwdp/schedule/schedule.py",
        "            self._assembly.cache.refill()\n",
        "            self._assembly.cache.stats()\n",
        _UPDATE,
    ),
    Bug(
        "a tile stays unmapped after a refresh that failed",
        "vmm_dwdp/memory/cache.py",
        "            try:\n                self._mend()\n",
        "            try:\n                self._torn.clear()\n",
        _FAILURES,
    ),
    Bug(
        "a torn tile is read",
        "vmm_dwdp/memory/cache.py",
        "        if (self._torn or self._old) and (torn",
        "        if not self and (torn",
        ("tests/unit/test_failures.py::test_a_refresh_that_cannot_be_undone_bars_passes_in_place_until_the_next",),
    ),
    Bug(
        "pages are unmapped under a tensor",
        "allocator/tensors.py",
        "        return not self._storage.expired()  # type",
        "        return False and not self._storage.expired()  # type",
        _STATES,
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
        "vmm_dwdp/group/membership.py",
        "self._begun |= shards.keys()",
        "self._begun -= shards.keys()",
        _AGAIN,
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
        "vmm_dwdp/group/membership.py",
        " + sum(_reserved.values()) + count",
        " + count",
        ("tests/unit/group/test_limits.py",),
    ),
    Bug(
        "the soft limit stays raised",
        "vmm_dwdp/group/membership.py",
        "            if soft == after:",
        "            if soft != after:",
        ("tests/unit/group/test_limits.py",),
    ),
    # -- what is interrupted
    Bug(
        "a slot is named before its job is handed over",
        "vmm_dwdp/schedule/layer.py",
        "        slot.holds = None\n        if pipeline",
        "        slot.holds = self\n        if pipeline",
        _INTERRUPTS,
    ),
    Bug(
        "flush does not wait for the thread of Python's",
        "vmm_dwdp/schedule/issue.py",
        "        self._run_now(lambda: None)\n",
        "        pass\n",
        ("tests/unit/schedule/test_copy_path.py::test_flush_waits_for_all_that_was_submitted",),
    ),
    Bug(
        "flush does not wait for the native thread",
        "allocator/_issue.c",
        "    await((IssuerObject *)object, NULL);\n",
        "    (void)object;\n",
        ("tests/unit/allocator/test_native_issue.py::test_flush_waits_for_all_that_was_submitted_and_raises_nothing",),
    ),
    Bug(
        "a slot that holds nothing is refilled without waiting",
        "vmm_dwdp/schedule/layer.py",
        "        if slot.holds is None:\n            slot.await_issue(pipeline)\n",
        "        if slot.holds is None:\n            pass\n",
        ("tests/unit/schedule/test_event_protocol.py::test_a_fetch_that_was_interrupted_and_is_made_anew",),
    ),
    Bug(
        "who refills a slot that holds nothing says that it read it",
        "vmm_dwdp/schedule/layer.py",
        "        if slot.holds is None:\n            slot.await_issue(pipeline)\n",
        "        if slot.holds is None:\n            slot.await_issue(pipeline)\n"
        "            self._driver.record(slot.consumed.event, stream)\n",
        ("tests/unit/schedule/test_event_protocol.py::test_a_fetch_that_was_interrupted_and_is_made_anew",),
    ),
    Bug(
        "signals come in the middle of what is to be whole",
        "allocator/uninterrupted.py",
        "    if _deferring or threading",
        "    if True or threading",
        _UNINTERRUPTED,
    ),
    Bug(
        "of the signals that were put off only the first is handled",
        "allocator/uninterrupted.py",
        "arrived = list(_arrived)",
        "arrived = _arrived[:1]",
        _UNINTERRUPTED,
    ),
    Bug(
        "a handler that raises keeps the others from theirs",
        "allocator/uninterrupted.py",
        "            _call(handlers, arrived)\n            raise\n",
        "            raise\n",
        _UNINTERRUPTED,
    ),
    Bug(
        "handlers of signals are not put back",
        "allocator/uninterrupted.py",
        "_restore(handlers, list(handlers))",
        "_restore(handlers, [])",
        _UNINTERRUPTED,
    ),
    Bug(
        "what lost its owner to an interruption is not closed",
        "allocator/handles.py",
        "            if owned is not None:\n                owned.close()\n",
        "            pass\n",
        _HANDLES,
    ),
    Bug(
        "close does not look for what has no owner",
        "vmm_dwdp/rank.py",
        "                self.ledger.sweep()\n",
        "                pass\n",
        _CLOSING,
    ),
    # -- updates
    Bug(
        "the cache is read after an update that could not fill it anew",
        "vmm_dwdp/schedule/schedule.py",
        "            self._assembly.cache.forget()\n",
        "            pass\n",
        ("tests/multiprocess/test_update.py::test_a_cache_that_cannot_be_filled_anew_is_not_read",),
    ),
    Bug(
        "an update in the middle of a pass lets the pass go on unasked",
        "vmm_dwdp/rank.py",
        "            self._lifecycle.ask_again()  # so that the next",
        "            pass  # so that the next",
        ("tests/multiprocess/test_update_again.py::test_an_update_that_fails_in_the_middle_of_a_pass_ends_the_pass",),
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
        "        if self.half_updated is None:\n            self._begun.clear()\n",
        "        self._begun.clear()\n",
        ("tests/multiprocess/test_update_again.py::test_an_update_covers_what_the_one_before_left_half_written",),
    ),
    Bug(
        "whatever revision ranks state, they share",
        "vmm_dwdp/group/exchange.py",
        'if request.get("revision") != self._revision:',
        'if request.get("revision") == id(self._revision):',
        ("tests/multiprocess/test_update_again.py::test_ranks_that_were_given_different_checkpoints_are_all_refused",),
    ),
    # -- threads, forks and devices
    Bug(
        "a second thread is let through in the middle of a pass",
        "vmm_dwdp/schedule/lifecycle.py",
        "        if self.in_pass and runner is not None",
        "        if self.runner < 0 and runner is not None",
        _TURN,
    ),
    Bug(
        "the pass of a thread that has ended bars all others",
        "vmm_dwdp/schedule/lifecycle.py",
        " and runner.is_alive():",
        ":",
        _TURN,
    ),
    Bug(
        "a pass does not end with its last layer",
        "vmm_dwdp/runtime.py",
        "        if layer == self._last_layer:\n            lifecycle.in_pass = False\n",
        "",
        _TURN,
    ),
    Bug(
        "an acquire that was refused begins a pass",
        "vmm_dwdp/runtime.py",
        "            if begins:\n                lifecycle.end_pass()\n",
        "",
        _TURN,
    ),
    Bug(
        "statistics are read off the device by any thread",
        "vmm_dwdp/runtime.py",
        "own = self._lifecycle.latest_runner == this_thread() and self._lifecycle.is_running",
        "own = self._lifecycle.is_running",
        _TURN,
    ),
    Bug(
        "statistics are read off events that are closed",
        "vmm_dwdp/runtime.py",
        "own = self._lifecycle.latest_runner == this_thread() and self._lifecycle.is_running",
        "own = self._lifecycle.latest_runner == this_thread()",
        ("tests/unit/test_threads.py::test_stats_after_close_are_the_latest",),
    ),
    Bug(
        "a forked child keeps its parent's door open",
        "vmm_dwdp/rank.py",
        "        rank._membership.forget()\n",
        "",
        _TURN,
    ),
    Bug(
        "a forked child keeps its parent's token locked",
        "vmm_dwdp/group/rendezvous.py",
        "    for opened in list(_opened):\n        opened.close()\n",
        "    pass\n",
        _RENDEZVOUS,
    ),
    Bug(
        "the device of a runtime stays current",
        "allocator/cuda_context.py",
        "        self._pop()\n        if self._current_device() != self._before:",
        "        if self._current_device() != self._before:",
        _CONTEXT,
    ),
    Bug(
        "a device counts as current while another's context is topmost",
        "allocator/cuda_context.py",
        "        elif topmost != self.address:\n            return False\n",
        "",
        _CONTEXT,
    ),
    Bug(
        "a pass goes on whatever device has become current",
        "vmm_dwdp/runtime.py",
        """        if lifecycle.runner == this and self._current_device() == self._index:""",
        """        if lifecycle.runner == this:""",
        _CURRENT,
    ),
    Bug(
        "a stream of another device is taken",
        "vmm_dwdp/schedule/schedule.py",
        "        if stream.device != self._driver.device:\n",
        "        if stream.device is None:\n",
        _CURRENT,
    ),
    Bug(
        "a pause of the native thread is not cut short",
        "allocator/_issue_thread.c",
        "    issuer->waiting++;\n    pthread_cond_signal(&issuer->hurry);\n",
        "    issuer->waiting++;\n",
        ("tests/unit/allocator/test_native_issue.py::test_a_pause_ends_when_somebody_begins_to_wait",),
    ),
    # -- the end
    Bug(
        "a door that cannot be shut keeps close from the rest",
        "vmm_dwdp/rank.py",
        "            with failures.noted():\n                need_no_device()\n",
        "            need_no_device()\n",
        _CLOSING,
    ),
    Bug(
        "one part that cannot be freed keeps close from the others",
        "vmm_dwdp/rank.py",
        "                with failures.noted():\n                    free()\n",
        "                free()\n",
        _CLOSING,
    ),
    Bug(
        "memory is freed although the device may still read it",
        "vmm_dwdp/rank.py",
        "            self._driver.synchronize()\n            for free",
        "            with failures.noted():\n                self._driver.synchronize()\n            for free",
        _CLOSING,
    ),
    Bug(
        "a failing clean-up takes the place of what went before",
        "allocator/handles.py",
        "        if error is None:\n            raise\n",
        "        raise\n",
        _UNINTERRUPTED,
    ),
    Bug(
        "a resource that cannot be closed takes the place of its block's exception",
        "allocator/handles.py",
        "        undo_after(error, self.close)\n",
        "        self.close()\n",
        _HANDLES,
    ),
    Bug(
        "a release that is refused takes the place of its block's exception",
        "vmm_dwdp/runtime.py",
        "            undo_after(error, lambda: self.release(layer, stream=stream))\n",
        "            self.release(layer, stream=stream)\n",
        _CLOSING,
    ),
    Bug(
        "a runtime that cannot be closed takes the place of its block's exception",
        "vmm_dwdp/rank.py",
        'a note on it."""\n        undo_after(error, self.close)\n',
        'a note on it."""\n        self.close()\n',
        _CLOSING,
    ),
    # -- readers
    Bug(
        "the tensors of a layer that is read in place are those of its slot",
        "vmm_dwdp/memory/virtual.py",
        "tensor = self._weights_in(mode)[layer.number][weight]",
        'tensor = self._weights_in("staged")[layer.number][weight]',
        ("tests/unit/test_runtime_states.py::test_the_tensors_of_a_layer_are_those_of_its_mode",),
    ),
    Bug(
        "integrity compares a slot with nothing",
        "vmm_dwdp/memory/assembly.py",
        "if not torch.equal(held, owned):",
        "if held.shape != owned.shape:",
        _CLOSING,
    ),
    Bug(
        "a placeholder has an address",
        "vmm_dwdp/integrations/spread_tensor.py",
        '*("data_ptr", "untyped_storage"',
        '*("untyped_storage"',
        _SPREAD,
    ),
    Bug(
        "a placeholder takes other bytes",
        "vmm_dwdp/integrations/spread_tensor.py",
        "    def data(self, _: torch.Tensor) -> None:\n        self.refuse()\n",
        "    def data(self, _: torch.Tensor) -> None:\n        pass\n",
        _SPREAD,
    ),
    Bug(
        "passes of several threads overlap in one model",
        "vmm_dwdp/integrations/transformers/turns.py",
        "            with self._lock:\n",
        "            with threading.RLock():\n",
        (
            "tests/unit/integrations/test_transformers_turns.py::test_no_pass_overlaps_another_whichever_model_of_it_is_called",
        ),
    ),
    Bug(
        "a pass that raised is not given up",
        "vmm_dwdp/integrations/transformers/turns.py",
        "            self._runtime.reset()\n            self._broken, self.reached",
        "            self._broken, self.reached",
        ("tests/unit/integrations/test_transformers_turns.py::test_after_a_pass_that_raised_every_thread_begins_anew",),
    ),
    Bug(
        "descriptors are looked for and not reserved",
        "vmm_dwdp/group/membership.py",
        "            _reserved[self] = count\n",
        "            _reserved[self] = 0\n",
        ("tests/unit/group/test_limits.py",),
    ),
    Bug(
        "what ranks hand over is not counted among the descriptors",
        "vmm_dwdp/group/membership.py",
        "* received + len(self._others) * held",
        "* received",
        ("tests/unit/test_runtime_states.py::test_more_shares_than_a_process_can_have_files",),
    ),
    Bug(
        "a layer whose slot is being read is hit",
        "allocator/_staged.c",
        "return !is_set(slot->reader) && slot->holds",
        "return slot->holds",
        _HIT_PATH,
    ),
    Bug(
        "a layer that its slot does not hold is hit",
        "allocator/_staged.c",
        "slot->holds == (PyObject *)layer && layer->place > pipeline->latest &&",
        "layer->place > pipeline->latest &&",
        _HIT_PATH,
    ),
    Bug(
        "a layer that is hit does not count as read",
        "allocator/_staged.c",
        "    slot->read = 1;\n    layer->hits++;",
        "    layer->hits++;",
        _HIT_PATH,
    ),
    Bug(
        "a hit does not wait for the copies to be given",
        "allocator/_staged.c",
        "    if (is_set(slot->ticket)) {",
        "    if (0) {",
        _HIT_PATH,
    ),
    Bug(
        "a hit waits for the copies of one stream alone",
        "allocator/_staged.c",
        "for (size_t i = 0; i < layer->num_ready; i++)\n        if (wait_for(",
        "for (size_t i = 0; i < 1; i++)\n        if (wait_for(",
        _HIT_PATH,
    ),
    Bug(
        "C names the layer before it hands the job over",
        "allocator/_staged.c",
        "    assign(&slot->holds, NULL); /* until it was handed over: see [Note: A slot that holds nothing] */\n",
        "    assign(&slot->holds, (PyObject *)following);\n",
        _HIT_PATH,
    ),
    Bug(
        "C releases without a record",
        "allocator/_staged.c",
        "    if (record(pipeline, layer->consumed, stream))\n        return -1;\n",
        "",
        _HIT_PATH,
    ),
    Bug(
        "C goes on with the pass of another thread",
        "allocator/_hit_path.c",
        "if (!path->turn->in_pass || path->turn->runner != this_thread())",
        "if (!path->turn->in_pass)",
        _HIT_PATH,
    ),
    Bug(
        "C hits a layer between passes",
        "allocator/_hit_path.c",
        "if (!path->turn->in_pass || path->turn->runner != this_thread())",
        "if (path->turn->runner != this_thread())",
        _HIT_PATH,
    ),
    Bug(
        "C does not ask whether the stream is captured",
        "allocator/_hit_path.c",
        "path->is_capturing(stream, &status) == 0 && status == 0",
        "path->is_capturing(stream, &status) == 0",
        _HIT_PATH,
    ),
    Bug(
        "C does not ask which context is current",
        "allocator/_hit_path.c",
        "path->get_current(&context) == 0 && context == path->context",
        "path->get_current(&context) == 0",
        _HIT_PATH,
    ),
    Bug(
        "a pass that ends in C does not end",
        "allocator/_hit_path.c",
        "        if (released > 0 && layer->is_last)\n            path->turn->in_pass = 0;\n",
        "",
        _HIT_PATH,
    ),
    Bug(
        "C leaves the first layers of the next pass to be given later",
        "allocator/_staged.c",
        "    if (pipeline->prompt && following->is_first)\n        return 0;\n",
        "",
        _HIT_PATH,
    ),
    Bug(
        "C hits a layer that is traced",
        "allocator/_staged.c",
        "layer->place > pipeline->latest &&\n           !is_set(pipeline->tracer);",
        "layer->place > pipeline->latest;",
        _HIT_PATH,
    ),
    Bug(
        "C keeps the interpreter while it waits for copies",
        "allocator/_issue.c",
        "    Py_BEGIN_ALLOW_THREADS\n    await_job(&owner->issuer, job);\n    Py_END_ALLOW_THREADS",
        "    await_job(&owner->issuer, job);",
        _HIT_PATH,
    ),
    Bug(
        "C hides the copies that it had fetched from the counts",
        "allocator/_staged.c",
        "    following->fetched_bytes += following->nbytes;\n",
        "",
        _HIT_PATH,
    ),
)
