"""The same source on AArch64, under emulation, and in WebAssembly: equal to the oracle here."""

import shutil
import subprocess

import pytest
import torch

from secateur import kernels
from secateur.errors import KernelError
from secateur.formats import DepthTaps, GroupCols
from secateur.formats.conv import convolve
from secateur.formats.portable import AARCH64, RUN, WASM, compile_to, message, outcome

# Outputs, inputs, kernel, rows of a group, picture, stride, padding.
CASES = [
    (21, 70, (1, 1), 4, (9, 17), (1, 1), (0, 0)),
    (18, 9, (3, 3), 8, (11, 14), (1, 1), (1, 1)),
    (7, 5, (3, 3), 1, (13, 9), (2, 2), (1, 1)),
    (33, 12, (1, 1), 16, (10, 11), (2, 2), (0, 0)),
    (6, 4, (5, 1), 2, (12, 30), (1, 3), (2, 0)),
]


def needed(*programs):
    missing = [name for name in programs if shutil.which(name) is None]
    if missing:
        pytest.skip(f"there is no {', '.join(missing)} here")


def compiled(target, command):
    try:
        return compile_to(target, command)
    except KernelError as error:
        if "failed" in str(error) and not any(said in str(error) for said in ("wasm-ld", "unable to execute")):
            raise
        pytest.skip(f"not compiled: {error}")


@pytest.fixture(scope="module")
def aarch64(tmp_path_factory):
    needed("qemu-aarch64", AARCH64[0])
    program = compiled(tmp_path_factory.mktemp("aarch64") / "convolutions", AARCH64)
    return lambda how: ["qemu-aarch64", str(program), *(["oracle"] if how == "oracle" else [])]


@pytest.fixture(scope="module")
def wasm(tmp_path_factory):
    needed("node", WASM[0], "wasm-ld")
    program = compiled(tmp_path_factory.mktemp("wasm") / "convolutions.wasm", WASM)
    return lambda how: ["node", str(RUN), str(program), how]


@pytest.mark.parametrize("machine", ["aarch64", "wasm"])
def test_the_portable_source_gives_what_the_oracle_gives(machine, request):
    command = request.getfixturevalue(machine)
    made = torch.Generator().manual_seed(0)
    for outputs, inputs, kernel, rows, size, stride, padding in CASES:
        weight = torch.randn(outputs, inputs, *kernel, generator=made)
        mask = torch.rand(weight.shape, generator=made) > 0.6
        packed = GroupCols(rows).pack(weight, mask, torch.randn(outputs, generator=made))
        x = torch.randn(2, inputs, *size, generator=made)
        how = stride, padding, (1, 1), (-2.0, 6.0)
        with kernels.forced("base"):
            wanted = convolve(packed, x, *how)
        text, shape = message(packed, x, *how)
        for variant in ("vectors", "oracle") if rows == 4 else ("vectors",):
            done = subprocess.run(command(variant), input=text, capture_output=True, timeout=60, check=False)
            assert done.returncode == 0, done.stderr
            got = outcome(done.stdout, shape)
            assert (got - wanted).abs().max() < 1e-4, f"{variant} {kernel}"
            assert not torch.equal(got, torch.zeros_like(got))


# Channels, kernel, picture, stride, padding.
DEPTHWISE = [
    (13, (3, 3), (9, 17), (1, 1), (1, 1)),
    (20, (5, 5), (11, 6), (2, 2), (2, 2)),
    (7, (3, 1), (3, 3), (1, 3), (1, 0)),
]


@pytest.mark.parametrize("machine", ["aarch64", "wasm"])
def test_depthwise_kernels_give_what_their_oracle_gives(machine, request):
    command = request.getfixturevalue(machine)
    made = torch.Generator().manual_seed(0)
    for channels, kernel, size, stride, padding in DEPTHWISE:
        weight = torch.randn(channels, 1, *kernel, generator=made)
        mask = torch.rand(weight.shape, generator=made) > 0.5
        packed = DepthTaps().pack(weight, mask, torch.randn(channels, generator=made))
        x = torch.randn(3, channels, *size, generator=made)
        how = stride, padding, (1, 1), (-1.0, 6.0)
        with kernels.forced("base"):
            wanted = convolve(packed, x, *how)
        strange = x.clone()
        strange[1, 2, 0, 0] = float("nan")
        with kernels.forced("base"):
            beside = convolve(packed, strange, *how)
        for variant, given, want in (("vectors", x, wanted), ("oracle", x, wanted), ("vectors", strange, beside)):
            text, shape = message(packed, given, *how)
            done = subprocess.run(command(variant), input=text, capture_output=True, timeout=60, check=False)
            assert done.returncode == 0, done.stderr
            torch.testing.assert_close(outcome(done.stdout, shape), want, equal_nan=True, rtol=1e-5, atol=1e-5)
        assert beside.isnan().any() and not beside.isnan().all()


@pytest.mark.parametrize("machine", ["aarch64", "wasm"])
def test_what_is_not_finite_propagates_there_too(machine, request):
    command = request.getfixturevalue(machine)
    weight = torch.tensor([[1.0, 0.0], [2.0, 1.0]]).view(2, 2, 1, 1)
    x = torch.tensor([[1.0, 2.0], [float("inf"), 1.0]]).view(1, 2, 1, 2)
    text, shape = message(GroupCols(1).pack(weight), x)
    done = subprocess.run(command("vectors"), input=text, capture_output=True, timeout=60, check=True)
    got = outcome(done.stdout, shape).flatten().tolist()
    assert got[0] != got[0]  # a zero times infinity
    assert got[1:] == [2.0, float("inf"), 5.0]


def test_a_compiler_that_is_not_there_is_named(tmp_path):
    with pytest.raises(KernelError, match="there is no cc-of-nowhere on the path"):
        compile_to(tmp_path / "x", ("cc-of-nowhere",))
