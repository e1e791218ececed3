"""The native thread under the sanitizers of the compiler, while jobs and issuers come and go."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.native import compiled

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")

STRESS = """
import ctypes, random, sys
from importlib.util import module_from_spec, spec_from_file_location

spec = spec_from_file_location("_native", sys.argv[1])
native = module_from_spec(spec)
spec.loader.exec_module(native)
libc = ctypes.CDLL(None)
succeed, compare = (ctypes.cast(function, ctypes.c_void_p).value for function in (libc.sched_yield, libc.memcmp))
random.seed(0)
same, other = (ctypes.create_string_buffer(text) for text in (b"same", b"else"))
one, two = ctypes.addressof(same), ctypes.addressof(other)
given, refused = (one, one, 4, 1, 0, 0, 1), (one, two, 4, 1, 0, 0, 1)  # the driver's call is memcmp(dsts, srcs, sizes)

class Refused(Exception):
    pass

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


@pytest.mark.parametrize("sanitizer", ["address", "thread", "undefined"])
def test_sanitizers_find_nothing_while_jobs_and_issuers_come_and_go(sanitizer: str, tmp_path: Path) -> None:
    runtime = {"address": "libasan.so", "thread": "libtsan.so", "undefined": "libubsan.so"}[sanitizer]
    found = subprocess.run(
        ["cc", f"-print-file-name={runtime}"], capture_output=True, text=True, check=True
    ).stdout.strip()
    if not Path(found).is_absolute():
        pytest.skip(f"the compiler has no {runtime}")
    library = compiled(tmp_path, "-g", f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all")
    environment = {**os.environ, "LD_PRELOAD": found, "ASAN_OPTIONS": "detect_leaks=0"}
    run = subprocess.run(
        [sys.executable, "-c", STRESS, str(library)], env=environment, capture_output=True, text=True, check=False
    )
    if "unexpected memory mapping" in run.stderr:
        pytest.skip("this kernel places memory where this compiler's sanitizer cannot watch it")
    assert (run.returncode, run.stdout) == (0, "True\n"), run.stderr
