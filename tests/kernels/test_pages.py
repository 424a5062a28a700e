"""Tensors in large pages: the same numbers, each with a storage of its own, and given back with the last of them."""

import copy
import gc
import mmap
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from secateur.accelerate import _settle, accelerate
from secateur.formats import Bitmap, SellBlocked, pages
from secateur.formats.bitmap_kv import pack
from secateur.formats.linear import SparseLinear
from secateur.formats.pages import APART, PAGE, empty, in_large_pages, settled

large = pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="this system maps no large pages")


@pytest.fixture
def all_are_large(monkeypatch):
    """Small tensors count as large, and what is asked for at once holds few of them; gives what was asked for."""
    asked = []

    def room(size, was=pages._room):
        found = was(size)
        asked.append(weakref.ref(found[0]))
        return found

    for name, value in (("LEAST", 1), ("CHUNK", 2**14), ("_room", room)):
        monkeypatch.setattr(pages, name, value)
    return asked


def some():
    made = torch.Generator().manual_seed(0)
    shapes = ((3, 5), (700, 9), (0, 4), (1,), (2000,), (4, 1, 77))
    dtypes = (torch.float32, torch.bfloat16, torch.uint8, torch.int32, torch.float16, torch.bool)
    return [(9 * torch.randn(s, generator=made)).to(d) for s, d in zip(shapes, dtypes, strict=True)]


@large
def test_tensors_are_the_same_and_each_is_by_itself(all_are_large, tmp_path):
    before = some()
    after = in_large_pages(before)
    assert len(all_are_large) == 2  # the last two do not fit
    for old, new in zip(before, after, strict=True):
        assert torch.equal(old, new) and old.dtype is new.dtype and new.is_contiguous()
        assert new.untyped_storage().nbytes() == old.nbytes and new.data_ptr() % APART == 0
    save_file({str(i): tensor for i, tensor in enumerate(after)}, tmp_path / "some.safetensors")
    for i, tensor in enumerate(before):
        assert torch.equal(load_file(tmp_path / "some.safetensors")[str(i)], tensor)
    torch.save(after[0], tmp_path / "one.pt")
    assert (tmp_path / "one.pt").stat().st_size < 4000
    copied = copy.deepcopy(after)
    assert all(map(torch.equal, copied, before)) and copied[0].data_ptr() != after[0].data_ptr()


@large
def test_memory_is_kept_by_each_and_given_back_with_the_last(all_are_large):
    after = in_large_pages(some())
    last = after.pop()
    del after
    gc.collect()
    assert [memory() is None for memory in all_are_large] == [True, False]
    assert torch.equal(last, some()[-1])
    del last
    gc.collect()
    assert all_are_large[1]() is None


@large
def test_a_large_tensor_begins_where_a_page_does(all_are_large):
    made = empty((3, 70, 9), torch.empty(0, dtype=torch.bfloat16))
    assert made.shape == (3, 70, 9) and made.dtype is torch.bfloat16 and made.data_ptr() % PAGE == 0
    made.fill_(7)
    assert (made == 7).all()


def test_what_is_small_or_elsewhere_stays(monkeypatch):
    before = some()
    assert all(a is b for a, b in zip(in_large_pages(before), before, strict=True))
    monkeypatch.setattr(pages, "LEAST", 0)
    away = [torch.empty(3, device="meta")]
    assert in_large_pages(away)[0] is away[0] and empty((2,), away[0]).is_meta
    assert in_large_pages([]) == []
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    assert all(a is b for a, b in zip(in_large_pages(before), before, strict=True))
    assert empty((2, 3), before[0]).shape == (2, 3)


@large
def test_a_system_that_refuses_is_no_harm(monkeypatch):
    class Refuses(mmap.mmap):
        def madvise(self, *about):
            raise OSError(22, "Invalid argument")

    monkeypatch.setattr(pages, "LEAST", 1)
    monkeypatch.setattr(mmap, "mmap", Refuses)
    before = some()
    assert all(a is b for a, b in zip(in_large_pages(before), before, strict=True))


@large
@pytest.mark.parametrize("format", [Bitmap(), SellBlocked()], ids=lambda format: format.name)
def test_packed_weights_multiply_as_before(format, all_are_large):
    made = torch.Generator().manual_seed(0)
    dense = [torch.randn(33, 70, generator=made) * (torch.rand(33, 70, generator=made) > 0.7) for _ in range(3)]
    x = torch.randn(2, 70, generator=made)
    before = [format.pack(weight) for weight in dense]
    for old, new, weight in zip(before, settled(before), dense, strict=True):
        assert torch.equal(new.matmul(x), old.matmul(x)) and torch.equal(new.dense(), weight)
    assert all_are_large


@large
def test_a_pruned_cache_grows_there(all_are_large):
    made = torch.Generator().manual_seed(0)
    x = torch.randn(2, 1, 2, 96, 16, generator=made)
    keep = torch.zeros(x.shape, dtype=torch.bool)
    keep[..., ::2] = True
    past, more = (pack(*(part[:, :, a:b] for part in (*x, *keep))) for a, b in ((0, 64), (64, 96)))
    asked = len(all_are_large)
    past.append_(more)
    assert len(all_are_large) > asked
    for found, whole, kept in zip(past.dense(), x, keep, strict=True):
        assert torch.equal(found, whole * kept)


@large
def test_layers_answer_as_before_and_are_loaded_and_exported(all_are_large):
    made = torch.Generator().manual_seed(0)
    dense = nn.Linear(40, 12)
    linear = nn.Linear(70, 40, bias=False)
    linear.weight.data *= torch.rand(linear.weight.shape, generator=made) > 0.9
    packed = SparseLinear.of(linear, SellBlocked())
    model = nn.Sequential(packed, dense).requires_grad_(False)
    x = torch.randn(1, 70, generator=made)
    wanted, before = model(x), [dense.weight.data_ptr(), *(t.data_ptr() for t in packed.packed.tensors.values())]
    _settle([packed], [dense, dense])
    after = [dense.weight.data_ptr(), *(t.data_ptr() for t in packed.packed.tensors.values())]
    assert len(all_are_large) == 2 and not {*before} & {*after} and all(at % APART == 0 for at in after)
    assert torch.equal(model(x), wanted)
    again = copy.deepcopy(model)
    again.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()})
    assert torch.equal(again(x), wanted)
    assert torch.equal(torch.export.export(model, (x,)).module()(x), wanted)


@large
def test_accelerated_models_are_settled(all_are_large):
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)).requires_grad_(False)
    x = torch.randn(1, 64, generator=torch.Generator().manual_seed(0))
    there = model[0].weight.data_ptr()
    fast = accelerate(model, x)
    assert all_are_large and fast.chosen == {"dense": 2}  # nothing of it is zero
    assert torch.equal(fast.model(x), model(x)) and model[0].weight.data_ptr() == there
