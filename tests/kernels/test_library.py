"""The library: levels, errors, threads of Python, a fork, the end of the process, and none at all."""

import os
import subprocess
import sys
import threading

import pytest
import torch

from secateur import kernels
from secateur.errors import KernelError, SettingError
from secateur.formats import Bitmap
from secateur.kernels import building


def test_a_level_is_forced_and_left_again(monkeypatch):
    name = "bitmap_matmul_f32"
    with kernels.forced("base"):
        assert kernels.find(name).level == "base"
        assert kernels.level() == "base"
    assert kernels.level() == kernels.library().machine
    monkeypatch.setenv(kernels.FORCED, "base")
    assert kernels.level() == "base"
    monkeypatch.setenv(kernels.FORCED, "avx")
    with pytest.raises(SettingError, match=r"there is no such level.\nDid you mean avx2\?"):
        kernels.level()


def test_a_level_above_the_processor_is_refused(monkeypatch, library):
    monkeypatch.setattr(library, "machine", "avx2")
    kernels._level.cache_clear()
    try:
        advice = r"this processor reaches avx2.\nAsk for base, avx2, or leave it unset"
        with pytest.raises(SettingError, match=advice), kernels.forced("avx512"):
            pass
    finally:
        kernels._level.cache_clear()


def test_a_kernel_that_is_not_there_is_not_found():
    assert kernels.find("bitmap_divide_f32") is None


def test_a_library_that_is_none_is_refused(tmp_path):
    file = tmp_path / kernels.FILE
    file.write_text("no library")
    with pytest.raises(KernelError, match="the system refuses them"):
        kernels.Library(file)


def test_a_library_of_another_version_is_refused(monkeypatch, library):
    monkeypatch.setattr(kernels, "VERSION", 999)
    with pytest.raises(KernelError, match="and this is 999"):
        kernels.Library(library.path)


def test_a_build_that_fails_says_what_the_compiler_found_wrong():
    said = "print('a.cpp:3: error: no such name'); [print('a warning') for _ in range(50)]; exit(1)"
    with pytest.raises(KernelError, match=r"failed:\na.cpp:3: error: no such name") as found:
        building._run([sys.executable, "-c", said])
    assert "a warning\n" not in str(found.value)
    with pytest.raises(
        KernelError, match="out of memory"
    ):  # where nothing is called an error, the end of all that is said
        building._run([sys.executable, "-c", "print('out of memory'); exit(1)"])


def weight_and_input(seed):
    made = torch.Generator().manual_seed(seed)
    weight, x = torch.randn(96, 160, generator=made), torch.randn(3, 160, generator=made)
    return Bitmap().pack(weight, torch.rand(96, 160, generator=made) < 0.5), x


def test_threads_of_python_call_at_once():
    cases = [weight_and_input(seed) for seed in range(6)]
    alone = [packed.matmul(x) for packed, x in cases]
    wrong = []
    before = torch.get_num_threads()

    def call(which):
        torch.set_num_threads(3)  # torch keeps it by thread
        packed, x = cases[which]
        if any(not torch.equal(packed.matmul(x), alone[which]) for _ in range(200)):
            wrong.append(which)

    try:
        callers = [threading.Thread(target=call, args=(which,)) for which in range(6)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
    finally:
        torch.set_num_threads(before)
    assert wrong == []


CHILD = """
import os, torch
from secateur.formats import Bitmap
torch.set_num_threads(2)
packed, x = Bitmap().pack(torch.eye(256)), torch.arange(256.0).view(1, 256)
assert torch.equal(packed.matmul(x), x)
child = os.fork()
assert all(torch.equal(packed.matmul(x), x) for _ in range(50))
if child:
    assert os.waitpid(child, 0)[1] == 0
"""


def test_a_fork_has_threads_of_its_own_and_the_process_ends():
    # A pool that joined its workers, or waited for those it had before the fork, would hang here.
    done = subprocess.run([sys.executable, "-c", CHILD], timeout=60, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


WITHOUT = """
import warnings, torch
from secateur import kernels
kernels.where = lambda: None
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    from secateur.formats import Bitmap
    weight, x = torch.randn(20, 30), torch.randn(2, 30)
    packed = Bitmap().pack(weight)
    for _ in range(2):
        assert torch.equal(packed.matmul(x), torch.nn.functional.linear(x, weight))
print(len(said), str(said[0].message)[:28], kernels.level())
"""


def test_without_a_library_torch_computes_and_it_is_said_once():
    done = subprocess.run([sys.executable, "-c", WITHOUT], timeout=60, capture_output=True, text=True)
    assert done.stdout == "1 The compiled kernels of this base\n", done.stderr


def test_the_environment_forces_a_level():
    code = "from secateur import kernels; print(kernels.find('bitmap_matmul_f32').level)"
    made = {**os.environ, kernels.FORCED: "base"}
    done = subprocess.run([sys.executable, "-c", code], timeout=60, capture_output=True, text=True, env=made)
    assert done.stdout == "base\n", done.stderr
