"""The library itself, compiled for AArch64 and run under emulation: every format equal to float64 there too."""

import ctypes
import shutil
import struct
import subprocess

import pytest
import torch
from torch.nn import functional as F

from secateur import kernels
from secateur.formats import NM, Bitmap, BitmapInt8, Block, DepthTaps, GroupCols, Sell8, Sell16, SellBlocked
from secateur.formats.conv import PLACES, arranged
from secateur.formats.decoder import Attend, Normalize, Rotate
from secateur.formats.packed import VALUES
from secateur.formats.program import Matmul

COMPILER = "aarch64-linux-gnu-g++"
ELSEWHERE = ("_avx2", "_avx512", "_avx512bf16", "_amx")
PORTABLE = kernels.SOURCES / "portable" / "run.cpp"


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    missing = [name for name in ("qemu-aarch64", COMPILER) if shutil.which(name) is None]
    if missing:
        pytest.skip(f"there is no {', '.join(missing)} here")
    made = tmp_path_factory.mktemp("aarch64") / "run"
    sources = [path for path in kernels.SOURCES.glob("*.cpp") if not path.stem.endswith(ELSEWHERE)]
    undefined = "-fsanitize=undefined", "-fsanitize-undefined-trap-on-error"  # a trap ends the program
    command = [COMPILER, "-std=c++17", "-O1", "-static", "-pthread", *undefined, *sources, PORTABLE]
    done = subprocess.run([*command, "-o", made], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return made


def answered(program, name, call, items, held, y):
    """What a kernel makes of its arguments there, and the level it ran at. `held` is all that its pointers point to."""
    memory, pointers, begins = bytearray(), [], {}

    def lay(thing):
        address = ctypes.addressof(thing) if isinstance(thing, ctypes.Structure) else thing.data_ptr()
        if address not in begins:
            memory.extend(b"\0" * (-len(memory) % 64))
            begins[address] = len(memory)
            size = ctypes.sizeof(thing) if isinstance(thing, ctypes.Structure) else thing.numel() * thing.element_size()
            memory.extend(ctypes.string_at(address, size) + b"\0" * 64)
        return begins[address]

    for thing in (call, *held):
        begin = lay(thing)
        for field, kind in thing._fields_ if isinstance(thing, ctypes.Structure) else ():
            if kind is ctypes.c_void_p and getattr(thing, field):
                pointers.append((begin + getattr(type(thing), field).offset, getattr(thing, field)))
    places = [number for place, address in pointers for number in (place, begins[address])]
    head = struct.pack("<64s5q", name.encode(), items, 2, begins[ctypes.addressof(call)], len(pointers), len(memory))
    message = head + struct.pack(f"<{len(places)}q", *places) + memory
    done = subprocess.run(["qemu-aarch64", program], input=message, capture_output=True, timeout=60, check=True)
    begin = 4 + begins[y.data_ptr()]
    got = torch.frombuffer(bytearray(done.stdout[begin : begin + y.numel() * y.element_size()]), dtype=y.dtype)
    return got.view(y.shape), kernels.LEVELS[struct.unpack("<i", done.stdout[:4])[0]]


def whole_numbers(shape, seed):
    return torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(seed)).float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "format",
    [Bitmap(), Sell16(), Sell8(), BitmapInt8(), NM(2, 4), Block(4, 4), GroupCols(4), SellBlocked()],
    ids=lambda f: f.name,
)
def test_every_format_multiplies(program, format, dtype):
    if isinstance(format, GroupCols) and dtype is not torch.float32:
        return
    shape = (36, 44)
    weight = whole_numbers(shape, 0).to(dtype)
    mask = (whole_numbers((36, 11), 1) > 0).repeat_interleave(4, 1) & (torch.arange(44) % 4 < 2)
    if isinstance(format, BitmapInt8):
        weight = weight.sign() * 127  # whole numbers of its scales
    packed = format.pack(weight, mask)
    for rows in (1, 21):
        x, bias = whole_numbers((rows, 44), 2).to(dtype), whole_numbers((36,), 3).to(dtype)
        y = x.new_full((rows, 36), 77)
        ready = packed.prepared
        call = Matmul(ctypes.addressof(ready.weight), x.data_ptr(), y.data_ptr(), bias.data_ptr(), rows)
        beside = (ready.weight.inner, *ready.weight.inner.kept) if isinstance(format, GroupCols) else ()
        held = (ready.weight, *beside, *packed.tensors.values(), *getattr(ready.weight, "kept", ()), x, y, bias)
        got, level = answered(program, ready.kernel, call, ready.items, held, y)
        wanted = (x.double() @ (weight * mask).double().T + bias.double()).to(dtype)
        assert torch.equal(got, wanted)
        assert level == ("neon" if isinstance(format, (GroupCols, SellBlocked)) else "base")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_blocks_and_chunks_that_are_whole_and_not(program, dtype):
    mask = whole_numbers((275, 531), 1) > 2
    weight, x = whole_numbers((275, 531), 0).to(dtype), whole_numbers((3, 531), 2).to(dtype)
    packed = SellBlocked().pack(weight, mask)
    x[1, 530] = float("inf")
    y = x.new_full((3, 275), 77)
    ready = packed.prepared
    call = Matmul(ctypes.addressof(ready.weight), x.data_ptr(), y.data_ptr(), None, 3)
    got, level = answered(program, ready.kernel, call, ready.items, (ready.weight, *packed.tensors.values(), x, y), y)
    wanted = x.double() @ (weight * mask).double().T
    assert torch.equal(got.isfinite(), wanted.isfinite())
    assert torch.equal(got[::2], wanted.to(dtype)[::2])
    assert level == "neon"


@pytest.mark.parametrize("stride", [(1, 1), (2, 2)])
@pytest.mark.parametrize("size", [(7, 3), (12, 19)])
@pytest.mark.parametrize("format", [GroupCols(1), GroupCols(8), DepthTaps()], ids=lambda f: f.name)
def test_every_format_convolves(program, format, size, stride):
    groups = 18 if isinstance(format, DepthTaps) else 1
    weight = whole_numbers((18, 18 // groups, 3, 3), 0)
    mask = whole_numbers(weight.shape, 1) > 0
    packed = format.pack(weight, mask, whole_numbers((18,), 2))
    x = whole_numbers((2, 18, *size), 3)
    call, shape = arranged(packed, x, stride, (1, 1), (1, 1), 2)
    y, held = torch.full(shape, 77.0), packed.prepared.weight
    call.weight, call.x, call.y = ctypes.addressof(held), x.data_ptr(), y.data_ptr()
    call.low, call.high = 0, float("inf")
    inner = (held.inner, *held.inner.kept) if isinstance(format, GroupCols) else ()
    things = (held, *inner, *packed.tensors.values(), *held.kept, x, y)
    if isinstance(format, GroupCols):
        places = torch.zeros_like(held.laid["columns"])
        call.places, things = places.data_ptr(), (*things, places)
        places.copy_(answered(program, PLACES, call, len(held.laid["rows"]), things, places)[0])
    got, level = answered(program, format.convolves, call, 2 * call.chunks * call.parts, things, y)
    bias = packed.format.bias(packed).double()
    wanted = F.conv2d(x.double(), (weight * mask).double(), bias, stride, 1, 1, groups).relu().float()
    assert torch.equal(got, wanted)
    assert level == "neon"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_between_the_products_of_a_decoder(program, dtype):
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype is torch.float32 else {"rtol": 1e-2, "atol": 1e-2}
    x, more, weight = (whole_numbers(shape, seed).to(dtype) for seed, shape in enumerate([(2, 11), (2, 11), (11,)]))
    total, y = x.new_full((2, 11), 77), x.new_full((2, 11), 77)
    call = Normalize(*(t.data_ptr() for t in (x, more, total, weight, y)), 2, 11, 0.25)
    got, level = answered(program, f"normalize_{VALUES[dtype]}", call, 2, (x, more, total, weight, y), y)
    wide = (x + more).double()
    wanted = wide / (wide.square().mean(1, keepdim=True) + 0.25).sqrt() * weight
    torch.testing.assert_close(got, wanted.to(dtype), **close)
    assert level == "neon"

    x, cos, sin = (whole_numbers(shape, seed).to(dtype) for seed, shape in enumerate([(2, 3, 10), (2, 10), (2, 10)]))
    call = Rotate(*(t.data_ptr() for t in (x, cos, sin)), 3, 10, 10)
    got, level = answered(program, f"rotate_{VALUES[dtype]}", call, 2, (x, cos, sin), x)
    across = torch.cat((-x[..., 5:], x[..., :5]), 2)
    assert torch.equal(got, x * cos[:, None] + across * sin[:, None])
    assert level == "neon"

    query, keys, values = (whole_numbers((2, 3, n, 10), n).to(dtype) / 2 for n in (5, 7, 6))
    fresh = [whole_numbers((2, 3, 10), seed).to(dtype) for seed in (8, 9)]
    out, strides = query.new_full(query.shape, 77), (*keys.stride()[:2], *values.stride()[:2])
    things = (query, keys, values, *fresh)
    call = Attend(*(t.data_ptr() for t in things), None, out.data_ptr(), 6, *strides, 0, 3, 5, 10, 0.5)
    got, level = answered(program, f"attend_{VALUES[dtype]}", call, 6, (*things, out), out)
    seen = [
        torch.cat((held[:, :, :6], new[:, :, None]), 2).double() for held, new in zip(things[1:], fresh, strict=False)
    ]
    wanted = (query.double() @ seen[0].mT * 0.5).softmax(3) @ seen[1]
    torch.testing.assert_close(got, wanted.to(dtype), **close)
    assert level == "neon"
