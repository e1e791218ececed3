"""The C under the sanitizers of the compiler, while jobs, issuers and layers come and go."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.native import compiled

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")

BEGIN = """
import ctypes, random, sys
from importlib.util import module_from_spec, spec_from_file_location

spec = spec_from_file_location("_native", sys.argv[1])
native = module_from_spec(spec)
spec.loader.exec_module(native)
libc = ctypes.CDLL(None)
succeed, compare, differ = (
    ctypes.cast(function, ctypes.c_void_p).value for function in (libc.sched_yield, libc.memcmp, libc.pthread_equal)
)
random.seed(0)
same, other = (ctypes.create_string_buffer(text) for text in (b"same", b"else"))
one, two = ctypes.addressof(same), ctypes.addressof(other)
given, refused = (one, one, 4, 1, 0, 0, 1), (one, two, 4, 1, 0, 0, 1)  # the driver's call is memcmp(dsts, srcs, sizes)

class Refused(Exception):
    pass
"""

JOBS = """
def made(issuer):
    lanes = range(random.randrange(4))
    batches = [tuple(random.choices([given, refused], [9, 1], k=random.randrange(4))) for _ in lanes]
    return issuer.job(tuple((1, 2, each, 3) for each in batches), [refused in each for each in batches])

failures = 0
for turn in range(20):
    issuer = native.Issuer(succeed, succeed, compare, succeed, 1, Refused)
    jobs = [made(issuer) for _ in range(5)]
    for _ in range(200):
        job = random.choice(jobs)
        try:
            if not job.done:
                job.result()
        except Refused:
            failures += 1
        issuer.submit(job)
        if random.random() < 0.1:
            issuer.flush()
        if random.random() < 0.1:  # whatever it is at
            jobs.remove(job)
            jobs.append(made(issuer))
            del job
    if turn % 2:
        issuer.close()
print(failures > 100)
"""

# Layers of a few slots in any order, legal or not, with a thread that calls C and one that is refused now and then
LAYERS = """
class Slot(native.SlotState):
    pass

class Layer(native.LayerState):
    pass

class Driver:
    index = 1  # which int() takes for the stream

class Runtime:
    asked = 0

    def acquire(self, number):
        self.asked += 1

    def release(self, number):
        self.asked += 1
        return True

hits = releases = 0
for turn in range(30):
    issuer = native.Issuer(succeed, succeed, compare, succeed, 1, Refused)
    calls = (differ, 0, differ, differ, differ, int, Refused)  # whose arguments differ, but for one event
    pipeline = native.PipelineState(Driver, issuer, calls, [], 9)
    slots = [Slot() for _ in range(2)]
    layers = [Layer(pipeline, slots[i % 2], (10, 11), 1 if i == 3 else 12, 13, 14) for i in range(5)]
    for place, layer in enumerate(layers):
        layer.place, layer.nbytes, layer.weights = place, 8, {place: layer}
        layer.following = layers[place + 2 if place + 2 < 5 else place % 2]
        layer.job = issuer.job(((1, 2, (random.choices([given, refused], [9, 1])[0],), 3),), None)
    for slot, layer in zip(slots, layers):
        issuer.submit(layer.job)
        slot.holds, slot.ticket = layer, layer.job
    turns = native.Turn()
    runtime = Runtime()
    path = native.HitPath(turns, Driver, calls, runtime, Runtime.acquire, Runtime.release)
    path.open(dict(enumerate(layers)))
    for step in range(300):
        turns.runner, turns.in_pass = native.this_thread(), random.random() < 0.95
        pipeline.timed = random.random() < 0.1
        pipeline.tracer = random.choices([None, object()], [19, 1])[0]
        layer = random.choice(layers) if random.random() < 0.1 else layers[step // 2 % 5]
        if layer is layers[0]:
            pipeline.latest = -1
        number = layers.index(layer) if random.random() < 0.98 else random.choice([[], "a", 99])
        try:
            if step % 2 == 0:
                hits += path.acquire(number) is not None
            else:
                releases += path.release(number) is None
        except Refused:
            pass
        slot = layer.slot
        if random.random() < 0.1:  # what Python does where something is unusual
            slot.reader = slot.ticket = None
            issuer.flush()
            slot.holds, slot.read = random.choice([None, *layers]), random.random() < 0.9
    if turn % 3 == 0:
        path.close()
    if turn % 2:
        issuer.close()
    del issuer, pipeline, slots, slot, layers, layer, path, turns, runtime
print(hits > 300 and releases > 300)
"""


@pytest.mark.parametrize("program", [JOBS, LAYERS], ids=["jobs", "layers"])
@pytest.mark.parametrize("sanitizer", ["address", "thread", "undefined"])
def test_sanitizers_find_nothing(sanitizer: str, program: str, tmp_path: Path) -> None:
    runtime = {"address": "libasan.so", "thread": "libtsan.so", "undefined": "libubsan.so"}[sanitizer]
    found = subprocess.run(
        ["cc", f"-print-file-name={runtime}"], capture_output=True, text=True, check=True
    ).stdout.strip()
    if not Path(found).is_absolute():
        pytest.skip(f"the compiler has no {runtime}")
    library = compiled(tmp_path, "-g", f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all")
    environment = {**os.environ, "LD_PRELOAD": found, "ASAN_OPTIONS": "detect_leaks=0"}
    run = subprocess.run(
        [sys.executable, "-c", BEGIN + program, str(library)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if "unexpected memory mapping" in run.stderr:
        pytest.skip("this kernel places memory where this compiler's sanitizer cannot watch it")
    assert (run.returncode, run.stdout) == (0, "True\n"), run.stderr
