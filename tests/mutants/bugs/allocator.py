"""In the driver's side: handles, contexts, descriptors."""

from __future__ import annotations

from typing import Final

from mutants.seeded import Bug

_HANDLES = ("tests/unit/allocator/test_handles.py",)
_SHARING = ("tests/unit/allocator/test_sharing.py",)
_STATES = ("tests/unit/test_runtime_states.py",)
_UNINTERRUPTED = ("tests/unit/allocator/test_uninterrupted.py",)
_CONTEXT = ("tests/unit/allocator/test_cuda_context.py",)

BUGS: Final = (
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
        "a message may be of any length",
        "allocator/sharing.py",
        "    if num_bytes > max_bytes:\n",
        "    if num_bytes < 0:\n",
        _SHARING,
    ),
    Bug(
        "pages are unmapped under a tensor",
        "allocator/tensors.py",
        "        return not self._storage.expired()  # type",
        "        return False and not self._storage.expired()  # type",
        _STATES,
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
)
