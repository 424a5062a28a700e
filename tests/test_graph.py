"""What lives and dies together: the algebra by hand, and masked equals removed on networks of every make."""

import copy
import importlib.util

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from secateur import edit
from secateur.edit import Mask, Remove
from secateur.errors import GraphError
from secateur.graph import channels, couple, heads, removals
from secateur.graph.positions import Positions
from secateur.graph.trace import follow
from secateur.site import Site
from secateur.task import Batch

# The algebra


def classes(p, x):
    return p.find(x).tolist()


def test_what_is_unified_is_one_class_and_the_rest_is_not():
    p = Positions()
    a, b, c = p.fresh(3), p.fresh(3), p.fresh(3)
    p.unify(a, b)
    p.unify(b, c[::-1])
    assert classes(p, a) == classes(p, b) == classes(p, c)[::-1]
    assert len(set(classes(p, a))) == 3


def test_many_to_one_and_chains_within_one_batch():
    p = Positions()
    a = p.fresh(6)
    p.unify(np.array([5, 5, 5, 3, 1]), np.array([4, 3, 2, 1, 0]))
    assert classes(p, a) == [0] * 6


def test_a_split_dimension_falls_into_its_factors():
    # 6 = 2 heads x 3: entry 4 is head 1, place 1.
    p = Positions()
    x = p.fresh(6)
    head, place = p.split(x, [2, 3])
    assert p.leaves(x)[4].tolist() == [p.find(head)[1], p.find(place)[1]]
    assert p.leaves(x).shape == (6, 2)


def test_unifying_products_unifies_their_factors():
    p = Positions()
    x, y = p.fresh(6), p.fresh(6)
    a, b = p.split(x, [2, 3])
    c, d = p.split(y, [2, 3])
    p.unify(x, y)
    assert classes(p, a) == classes(p, c)
    assert classes(p, b) == classes(p, d)


def test_grouped_queries_6_query_heads_over_2_key_value_heads():
    # 12 = 6 queries x 2 places, and 6 = 2 key-value heads x 3.
    p = Positions()
    q, kv = p.fresh(12), p.fresh(2)
    query, _ = p.split(q, [6, 2])
    p.unify(query, p.join([kv, p.fresh(3, frozen=True)]))
    owner = [row[0] for row in p.leaves(q).tolist()]
    assert owner == [p.find(kv)[0]] * 6 + [p.find(kv)[1]] * 6
    assert p.leaves(q).shape == (12, 3)


def test_two_splittings_of_one_dimension_meet_in_the_finer():
    # 12 = 2 x 6 and 12 = 6 x 2, so 12 = 2 x 3 x 2.
    p = Positions()
    x = p.fresh(12)
    two, six = p.split(x, [2, 6])
    six_, two_ = p.split(x, [6, 2])
    assert p.leaves(x).shape == (12, 3)
    assert p.leaves(x)[:, 0].tolist() == [p.find(two)[0]] * 6 + [p.find(two)[1]] * 6
    assert p.leaves(x)[:, 2].tolist() == p.find(two_).tolist() * 6
    assert p.leaves(six)[:, 0].tolist() == p.leaves(six_)[:3, 1].repeat(2).tolist()


def test_splittings_with_no_common_refinement_freeze():
    # 6 = 2 x 3 and 6 = 3 x 2.
    p = Positions()
    x = p.fresh(6)
    p.split(x, [2, 3])
    p.split(x, [3, 2])
    p.settle()
    assert p.conflicts
    assert p.frozen(p.leaves(x).reshape(-1)).all()


def test_rotary_halves_pair_up_places():
    # x * cos + cat(-x[2:], x[:2]) * sin on a head of 4: place i goes with place i + 2.
    p = Positions()
    x = p.fresh(8)
    _, place = p.split(x, [2, 4])
    p.unify(place, np.concatenate([place[2:], place[:2]]))
    found = p.find(place)
    assert found[0] == found[2] != found[1] == found[3]
    assert p.leaves(x)[:, 1].tolist() == found.tolist() * 2


def test_a_concatenation_of_products_keeps_each_one_its_own():
    p = Positions()
    a, b = p.fresh(2), p.fresh(3)
    place = p.fresh(2)
    x = np.concatenate([p.join([a, place]), p.join([b, place])])
    head, inner = p.split(x, [5, 2])
    assert p.find(head).tolist() == p.find(np.concatenate([a, b])).tolist()
    assert p.find(inner).tolist() == p.find(place).tolist()


def test_what_stays_keeps_its_factors_and_not_the_other_way_round():
    p = Positions()
    a, b = p.fresh(2), p.fresh(2)
    x = p.join([a, b])
    p.freeze(b[:1])
    p.settle()
    assert not p.frozen(x).any()
    p.freeze(x[3:])
    p.settle()
    assert p.frozen(a).tolist() == [False, True]
    assert p.frozen(b).tolist() == [True, True]


@given(st.integers(0, 10_000))
def test_what_is_unified_is_a_product_of_the_same_classes(seed):
    # Dimensions of 24 split at nested places, then tied entry by entry, some of them shifted or reversed.
    draw = np.random.default_rng(seed)
    p, tied = Positions(), []
    dims = [p.fresh(24) for _ in range(4)]
    for d in dims:
        for sizes in ([2, 12], [6, 4], [2, 3, 4], [24], [6, 2, 2]):
            if draw.random() < 0.4:
                p.split(d, sizes)
    for _ in range(3):
        x, y = (dims[i] for i in draw.integers(0, 4, 2))
        y = [y, y[::-1], np.concatenate([y[4:], y[:4]])][draw.integers(3)]
        p.unify(x, y)
        tied.append((x, y))
    p.settle()
    if p.conflicts:
        return
    for x, y in tied:
        for a, b in zip(p.leaves(x).tolist(), p.leaves(y).tolist(), strict=True):
            assert set(a) - {-1} == set(b) - {-1}


def test_a_product_that_contains_itself_ends():
    p = Positions()
    x, y = p.fresh(2), p.fresh(2)
    p.unify(x, p.pair(x, y, 2))
    p.leaves(x)  # neither hangs nor raises
    p.settle()


# Networks


def bn(width):
    return nn.BatchNorm2d(width)


class MobileNet(nn.Module):
    """Inverted residuals: widen, depthwise, narrow."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), bn(8), nn.ReLU6())
        self.block1 = self.inverted(8, 24, 8)
        self.block2 = self.inverted(8, 24, 12)
        self.head = nn.Linear(12, 4)

    @staticmethod
    def inverted(i, mid, o):
        return nn.Sequential(
            nn.Conv2d(i, mid, 1, bias=False), bn(mid), nn.ReLU6(inplace=True),
            nn.Conv2d(mid, mid, 3, 1, 1, groups=mid, bias=False), bn(mid), nn.ReLU6(),
            nn.Conv2d(mid, o, 1, bias=False), bn(o),
        )  # fmt: skip

    def forward(self, x):
        x = self.stem(x)
        x = self.block2(x + self.block1(x))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class DenseNet(nn.Module):
    """Each layer reads all before it."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.layers = nn.ModuleList(
            nn.Sequential(bn(6 + 4 * i), nn.ReLU(), nn.Conv2d(6 + 4 * i, 4, 3, padding=1)) for i in range(3)
        )
        self.norm, self.fc = bn(18), nn.Linear(18 * 4, 4)

    def forward(self, x):
        found = [self.stem(x)]
        for layer in self.layers:
            found.append(layer(torch.cat(found, 1)))
        x = F.avg_pool2d(self.norm(torch.cat(found, 1)), 4)
        return self.fc(torch.flatten(x, 1))  # 4 columns to a channel


class ShuffleNet(nn.Module):
    """Grouped convolutions with a shuffle of 2 groups between them."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.first, self.depth = nn.Conv2d(8, 16, 1, groups=2), nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.second, self.fc = nn.Conv2d(16, 8, 1, groups=2), nn.Linear(8, 4)

    def forward(self, x):
        x = F.relu(self.first(self.stem(x)))
        b, c, h, w = x.shape
        x = x.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w)
        return self.fc(self.second(self.depth(x)).mean((2, 3)))


class ShuffleV2(nn.Module):
    """Half of the channels pass, half are worked on, then every second one changes sides."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 1)
        self.one, self.two, self.fc = nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 1), nn.Linear(12, 4)

    def forward(self, x):
        x = self.stem(x)
        x = torch.cat([x[:, 0::2], F.relu(self.one(x[:, 1::2]))], 1)
        a, b = x.chunk(2, 1)
        return self.fc(torch.cat([a, self.two(b)], 1).amax((2, 3)))


class SqueezeExcite(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.down, self.up = nn.Conv2d(3, 12, 3, padding=1), nn.Linear(12, 6), nn.Linear(6, 12)
        self.out = nn.Conv2d(12, 5, 1)

    def forward(self, x):
        x = self.conv(x)
        gate = torch.sigmoid(self.up(F.relu(self.down(x.mean((2, 3))))))
        return self.out(x * gate.view(*gate.shape, 1, 1).expand_as(x)).flatten(1)


class Grouped(nn.Module):
    """ResNeXt: 3 groups in the middle, and a shortcut."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.a, self.b, self.c = nn.Conv2d(8, 12, 1), nn.Conv2d(12, 12, 3, padding=1, groups=3), nn.Conv2d(12, 8, 1)
        self.fc = nn.Conv2d(8, 2, 1)

    def forward(self, x):
        x = self.stem(x)
        return self.fc(x + self.c(F.relu(self.b(F.relu(self.a(x))))))


class Upsampler(nn.Module):
    """Transposed convolution, interpolation, pixel shuffle, a square layer round which there is a shortcut."""

    def __init__(self):
        super().__init__()
        self.a, self.square, self.up = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1), nn.ConvTranspose2d(8, 6, 2, 2)
        self.b, self.c = nn.Conv2d(6, 20, 3, padding=1), nn.Conv2d(5, 3, 1)

    def forward(self, x):
        x = self.a(x)
        x = self.up(F.silu(x + self.square(x)))
        return self.c(F.pixel_shuffle(self.b(F.interpolate(x, scale_factor=2.0)), 2))


class FusedAttention(nn.Module):
    """One matrix for queries, keys and values, split by a reshape; softmax written out."""

    def __init__(self):
        super().__init__()
        self.count, self.head_dim = 4, 6
        self.embed, self.qkv, self.proj = nn.Linear(5, 16), nn.Linear(16, 72), nn.Linear(24, 16)
        self.out = nn.Linear(16, 3)

    def forward(self, x):
        x = self.embed(x)
        b, t, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, t, 3, self.count, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        a = (q @ k.transpose(-2, -1) * self.head_dim**-0.5).softmax(-1)
        return self.out(x + self.proj((a @ v).transpose(1, 2).flatten(2)))


class Lstm(nn.Module):
    """Two layers, both ways, with projections."""

    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(6, 8, num_layers=2, batch_first=True, bidirectional=True, proj_size=4)
        self.fc = nn.Linear(8, 3)

    def forward(self, x):
        return self.fc(self.rnn(x)[0][:, -1])


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=1))


def images(size=8):
    return Batch((torch.randn(2, 3, size, size),))


def tokens():
    return Batch({"input_ids": torch.randint(0, 50, (2, 7))})


def pack(data):
    spec = importlib.util.spec_from_file_location("data_pack_models", data / "models.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# How many units, by site. "!" is a site a norm takes statistics over.
NETWORKS = {
    "mobilenet": (MobileNet, images, {"stem.0": 8, "block1.0": 24, "block2.0": 24, "block2.6": 12}),
    "densenet": (DenseNet, images, {"stem": 6, "layers.0.2": 4, "layers.1.2": 4, "layers.2.2": 4}),
    "shuffle": (ShuffleNet, images, {"stem": 4, "first": 4, "second": 4}),
    "shuffle-v2": (ShuffleV2, images, {"stem": 6, "two": 6}),
    "squeeze-excite": (SqueezeExcite, images, {"conv": 12, "down": 6}),
    "grouped": (Grouped, images, {"stem": 8, "a": 4, "b": 4}),
    "upsampler": (Upsampler, images, {"a": 8, "up": 6, "b": 5}),
    "fused": (FusedAttention, lambda: Batch((torch.randn(2, 6, 5),)), {"embed": 16, "qkv": 4}),
    "rnn": (tiny.rnn, lambda: Batch((torch.randn(2, 5, 8),)), {"gru": 24}),
    "lstm": (Lstm, lambda: Batch((torch.randn(2, 5, 6),)), {"rnn": 8, "rnn.channel": 4}),
    "vit": (
        tiny.vision_transformer,
        lambda: Batch({"pixel_values": torch.randn(2, 3, 8, 8)}),
        {
            "vit.embeddings.patch_embeddings.projection!": 32,
            **{f"vit.layers.{i}.{n}": u for i in (0, 1) for n, u in (("attention", 4), ("mlp", 64))},
        },
    ),
    "llama": (
        tiny.decoder,
        tokens,
        {
            "model.embed_tokens!": 32,
            **{f"model.layers.{i}.{n}": u for i in (0, 1) for n, u in (("self_attn", 2), ("mlp", 64))},
        },
    ),
    "gpt2": (
        gpt2,
        tokens,
        {
            "transformer.wte!": 32,
            **{f"transformer.h.{i}.{n}": u for i in (0, 1) for n, u in (("attn", 4), ("mlp", 128))},
        },
    ),
    "bert": (
        tiny.encoder,
        tokens,
        {
            "bert.embeddings.word_embeddings!": 32,
            "bert.pooler.dense": 32,
            **{f"bert.encoder.layer.{i}{n}": u for i in (0, 1) for n, u in ((".attention", 4), ("", 64))},
        },
    ),
}  # fmt: skip


def lively(model):
    """Every parameter and statistic drawn at random, so that nothing is zero or one by chance."""
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("running_var"):
                value.copy_(torch.rand(value.shape, generator=draw) + 0.5)
            elif value.is_floating_point() and "inv_freq" not in name:
                value.add_(0.1 * torch.randn(value.shape, generator=draw))
    return model.eval()


@pytest.fixture(scope="module")
def networks():
    """Every network with its example and what couples in it, made when first asked for."""
    made = {}

    def get(name):
        if name not in made:
            torch.manual_seed(0)
            make, example, _ = NETWORKS[name]
            model, batch = lively(make()), example()
            made[name] = model, batch, couple(model, batch)
        return made[name]

    return get


def some(units, seed=3):
    keep = torch.ones(units, dtype=torch.bool)
    keep[torch.randperm(units, generator=torch.Generator().manual_seed(seed))[: max(1, int(0.3 * units))]] = False
    return keep


def answer(model, batch):
    with torch.no_grad():
        found = batch.through(model)
    return found if isinstance(found, torch.Tensor) else found.logits


def masked(model, sites, keep):
    found = copy.deepcopy(model)
    for site in sites:
        Mask(site, keep[site.name]).apply_(found)
    return found


def removed(model, sites, keep):
    found = copy.deepcopy(model)
    edit.apply_(found, removals(sites, keep))
    return found


def left_over(model, sites, keep):
    """Parameters that no removed unit owns, counted by marks and without Remove."""
    marks = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in marks.parameters():
            parameter.fill_(1)
    return sum(int(p.sum()) for p in masked(marks, sites, keep).parameters())


def close(a, b):
    assert a.shape == b.shape
    assert float((a - b).abs().max()) <= 1e-4 * float(a.abs().max())


@pytest.mark.parametrize("name", NETWORKS)
def test_the_sites_are_the_ones_a_person_would_name(networks, name):
    _, _, coupling = networks(name)
    found = {s.name + "!" * (s.name in coupling.inexact): s.units for s in coupling.sites}
    assert found == NETWORKS[name][2]
    assert all(site.removable for site in coupling.sites)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_rules_alone_are_right(networks, name):
    # Nothing was saved by the trial at the end: what the rules say is what was offered.
    model, batch, coupling = networks(name)
    unproven = couple(model, batch, verify=False)
    assert [(s.name, s.units) for s in unproven.sites] == [(s.name, s.units) for s in coupling.sites]
    assert coupling.frozen == ()


@pytest.mark.parametrize("name", NETWORKS)
def test_each_site_masked_equals_removed(networks, name):
    model, batch, coupling = networks(name)
    dense = answer(model, batch)
    for site in coupling.sites:
        keep = {site.name: some(site.units)}
        cut = answer(removed(model, [site], keep), batch)
        assert cut.shape == dense.shape
        if site.name not in coupling.inexact:
            close(answer(masked(model, [site], keep), batch), cut)
            assert not torch.allclose(cut, dense, rtol=1e-3)  # the cut is felt, so that equality says something


@pytest.mark.parametrize("name", NETWORKS)
def test_all_sites_at_once_masked_equals_removed_counted_saved_and_replayed(networks, name, tmp_path):
    model, batch, coupling = networks(name)
    sites = [s for s in coupling.sites if s.name not in coupling.inexact]
    keep = {s.name: some(s.units) for s in sites}
    cut = removed(model, sites, keep)
    close(answer(masked(model, sites, keep), batch), answer(cut, batch))
    assert sum(p.numel() for p in cut.parameters()) == left_over(model, sites, keep)
    edit.save(removals(sites, keep), tmp_path / "edits.safetensors")
    replayed = copy.deepcopy(model)
    edit.apply_(replayed, edit.load(tmp_path / "edits.safetensors"))
    assert torch.equal(answer(replayed, batch), answer(cut, batch))


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "vit"])
def test_the_residual_stream_can_be_cut_with_all_that_reads_and_writes_it(networks, name):
    model, batch, coupling = networks(name)
    (stream,) = coupling.of("stream")
    cut = removed(model, [stream], {stream.name: some(stream.units)})
    assert answer(cut, batch).shape == answer(model, batch).shape
    assert answer(cut, batch).isfinite().all()


@pytest.mark.data
def test_resnet_shortcuts_of_slices_and_padding(data):
    from safetensors.torch import load_file

    model, batch = pack(data).ResNetCifar(20), images(32)
    model.load_state_dict(load_file(data / "weights" / "resnet20_cifar10_jpeg.safetensors"))
    model.eval()
    coupling = couple(model, batch)
    inner = {f"layer{k}.{j}": 16 * 2 ** (k - 1) for k in (1, 2, 3) for j in range(3)}
    assert {s.name: s.units for s in coupling.sites} == {"conv1": 16, **inner}
    assert coupling.frozen == ()
    # The 16 channels of the first stage are 8..23 of the second stage and 24..39 of the third.
    shared = {part.key: part.owner.flatten() for part in coupling.sites[0].parts if part.axis == 0}
    assert shared["layer3.2.conv2.weight"].tolist() == [-1] * 24 + list(range(16)) + [-1] * 24
    keep = {s.name: some(s.units) for s in coupling.sites}
    cut = removed(model, coupling.sites, keep)
    close(answer(masked(model, coupling.sites, keep), batch), answer(cut, batch))
    assert sum(p.numel() for p in cut.parameters()) == left_over(model, coupling.sites, keep)
    assert cut.layer1[0].conv1.out_channels == 12


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "weights", "size", "sites"),
    [("FastestDet", "fastestdet_bccd", 352, 34), ("RLFN", "rlfn_x4", 48, 25)],
)
def test_a_detector_and_a_super_resolver(data, name, weights, size, sites):
    from safetensors.torch import load_file

    make = getattr(pack(data), name)
    model, batch = (make(3) if name == "FastestDet" else make()), Batch((torch.rand(1, 3, size, size),))
    model.load_state_dict(load_file(data / "weights" / f"{weights}.safetensors"))
    model.eval()
    coupling = couple(model, batch)
    assert coupling.frozen == ()
    assert len(coupling.sites) == sites
    keep = {s.name: some(s.units) for s in coupling.sites}
    cut = removed(model, coupling.sites, keep)
    close(answer(masked(model, coupling.sites, keep), batch), answer(cut, batch))
    assert sum(p.numel() for p in cut.parameters()) == left_over(model, coupling.sites, keep)


@pytest.mark.model
@pytest.mark.slow  # 25 s: opening a model of 134.5 M parameters
def test_a_real_language_model(smollm2):
    batch = Batch({"input_ids": torch.arange(16)[None]})
    coupling = couple(smollm2.model, batch)
    assert coupling.frozen == ()
    assert {s.units for s in coupling.of("head")} == {3}
    assert {s.units for s in coupling.of("channel")} == {1536}
    assert [len(coupling.of(kind)) for kind in ("head", "channel", "stream")] == [30, 30, 1]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_written_out_or_called_is_the_same(attention):
    model = tiny.decoder()
    model.set_attn_implementation(attention)
    batch = Batch({"input_ids": torch.randint(0, 50, (2, 7)), "attention_mask": torch.ones(2, 7, dtype=torch.long)})
    coupling = couple(model, batch)
    assert [(s.kind, s.units) for s in coupling.sites] == [("stream", 32)] + 2 * [("head", 2), ("channel", 64)]
    assert coupling.frozen == ()


def test_the_neurons_of_experts_go_together():
    model, batch = lively(tiny.moe()), tokens()
    coupling = couple(model, batch)
    site = next(s for s in coupling.sites if s.name == "model.layers.0.mlp.experts")
    assert {part.name.split(".")[-1]: part.axis for part in site.parts} == {"gate_up_proj": 1, "down_proj": 2}
    assert coupling.multiples == dict.fromkeys(coupling.multiples, 8)  # grouped products take whole 16 bytes
    assert site.name in coupling.multiples
    keep = {site.name: torch.arange(32) % 4 != 1}
    close(answer(masked(model, [site], keep), batch), answer(removed(model, [site], keep), batch))


def test_what_is_held_of_a_graph_grows_with_its_layers_and_no_faster():
    one, two, three = (len(follow(tiny.decoder(layers=n), tokens()).tracing.positions) for n in (1, 2, 3))
    assert three - two == two - one


# Particulars


def test_a_kv_head_owns_its_query_heads_and_no_rotary_pair_is_torn(networks):
    _, _, coupling = networks("llama")
    site = coupling.of("head")[0]
    owner = {part.name.split(".")[-2]: part.owner.flatten().tolist() for part in site.parts}
    assert owner["q_proj"] == owner["o_proj"] == [0] * 16 + [1] * 16  # 4 query heads of 8, two to a key-value head
    assert owner["k_proj"] == owner["v_proj"] == [0] * 8 + [1] * 8


def test_tied_embeddings_are_one_part(networks):
    _, _, coupling = networks("llama")
    names = [part.name for part in coupling.of("stream")[0].parts]
    assert sum("embed_tokens" in n or "lm_head" in n for n in names) == 1


def test_a_fused_matrix_gives_a_head_three_runs_of_rows(networks):
    _, _, coupling = networks("gpt2")
    site = coupling.of("head")[0]
    (part,) = (p for p in site.parts if p.name.endswith("c_attn.weight"))
    assert part.turned
    assert part.shape == (96, 32)
    assert (part.owner.flatten() == 1).nonzero().flatten().tolist() == [
        *range(8, 16), *range(40, 48), *range(72, 80)
    ]  # fmt: skip
    numbers = {(n.module, n.attribute): n.per_unit for n in site.numbers}
    assert numbers["transformer.h.0.attn", "split_size"] == 8
    assert numbers["transformer.h.0.attn", "num_heads"] == 1


def test_head_counts_follow_the_cut(networks):
    model, _, coupling = networks("bert")
    site = coupling.of("head")[0]
    cut = removed(model, [site], {site.name: torch.tensor([True, True, False, True])})
    attention = cut.bert.encoder.layer[0].attention.self
    assert (attention.num_attention_heads, attention.all_head_size) == (3, 24)
    assert attention.query.out_features == 24


def test_a_concatenation_is_cut_in_turn(networks):
    # layers.2 reads stem, layers.0 and layers.1 side by side: 6 + 4 + 4, less 1 each.
    model, _, coupling = networks("densenet")
    keep = {s.name: some(s.units) for s in coupling.sites}
    cut = removed(model, coupling.sites, keep)
    assert cut.layers[2][2].in_channels == 14 - 3
    assert cut.layers[2][0].num_features == 14 - 3


def test_depthwise_and_grouped_convolutions_set_their_groups(networks):
    model, _, coupling = networks("mobilenet")
    site = next(s for s in coupling.sites if s.name == "block1.0")
    cut = removed(model, [site], {site.name: some(24)})
    depthwise = cut.block1[3]
    assert (depthwise.groups, depthwise.in_channels, depthwise.out_channels) == (17, 17, 17)
    model, _, coupling = networks("grouped")
    site = next(s for s in coupling.sites if s.name == "a")
    cut = removed(model, [site], {site.name: some(4)})
    assert (cut.b.groups, cut.b.in_channels, cut.a.out_channels) == (3, 9, 9)


@pytest.mark.parametrize("name", ["mobilenet", "grouped", "upsampler", "llama"])
def test_the_work_of_a_unit_is_what_a_counter_counts(networks, name):
    from secateur.outcome import count_flops

    model, batch, coupling = networks(name)
    # Attention's own products belong to no tensor, so heads are left out.
    for site in coupling.of("channel"):
        keep = some(site.units)
        cut = removed(model, [site], {site.name: keep})
        saved = (count_flops(model, batch) - count_flops(cut, batch)) / batch.size
        gone = ~keep
        told = float(site.cost("flops")[gone].sum())
        square = [p.name for p in site.parts if [q.name for q in site.parts].count(p.name) > 1]
        if square:  # where a unit is a row and a column of one tensor, the crossing is told twice
            continue
        assert told == pytest.approx(saved, rel=1e-6)


def test_blocks_are_named(networks):
    for name, block in (("llama", "model.layers.1"), ("bert", "bert.encoder.layer.1")):
        _, _, coupling = networks(name)
        assert {s.block for s in coupling.sites if ".1" in s.name} == {block}


def test_channels_and_heads_are_the_cutters(networks):
    model, batch, coupling = networks("gpt2")
    assert [s.name for s in heads(model, batch)] == [s.name for s in coupling.of("head")]
    assert [s.name for s in channels(model, batch)] == [s.name for s in coupling.of("channel")]


def test_the_model_is_left_as_it_was(networks):
    model = tiny.cnn().train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    names = {n: (type(m), m.training) for n, m in model.named_modules()}
    couple(model, images())
    assert {n: (type(m), m.training) for n, m in model.named_modules()} == names
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())


def test_an_operator_without_a_rule_freezes_what_it_touches_and_is_named():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.free, self.held, self.odd, self.out = (
                nn.Linear(5, 8),
                nn.Linear(8, 6),
                nn.Linear(6, 6),
                nn.Linear(6, 2),
            )

        def forward(self, x):
            return self.out(self.odd(torch.linalg.matrix_exp(self.held(torch.relu(self.free(x))))))

    coupling = couple(Odd().eval(), Batch((torch.randn(6, 5),)))
    assert {s.name: s.units for s in coupling.sites} == {"free": 8, "odd": 6}
    (frozen,) = coupling.frozen
    assert str(frozen) == (
        "frozen: aten.linalg_matrix_exp at the model itself: there is no rule for this operator"
    )  # fmt: skip


@pytest.mark.parametrize("split", [
    lambda x: x.chunk(2, 1)[0] - x.chunk(2, 1)[1],
    lambda x: x[:, 0::2] - x[:, 1::2],
    lambda x: F.pixel_shuffle(x, 2),
    lambda x: x.unflatten(1, (2, 4)).select(1, 0),
    lambda x: F.glu(x, 1),
    lambda x: x.repeat(1, 2, 1, 1),
    lambda x: x.roll(1, 1),
])  # fmt: skip
def test_a_count_that_stands_in_the_code_is_no_unit(split):
    # What comes out stays; halves, phases and cells are counts in the code, so nothing is left to take out.
    class Tail(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 1)

        def forward(self, x):
            return split(self.conv(x))

    coupling = couple(Tail().eval(), images(), verify=False)
    assert coupling.sites == ()
    assert coupling.frozen == ()


def test_without_a_site_the_operators_that_froze_the_rest_are_named():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(5, 6), nn.Linear(6, 2)

        def forward(self, x):
            return self.b(torch.linalg.matrix_exp(self.a(x)))

    coupling = couple(Odd().eval(), Batch((torch.randn(6, 5),)))
    with pytest.raises(GraphError, match=r"sites of kind channel were asked for(.|\n)*aten.linalg_matrix_exp at the"):
        coupling.need("channel")


# Recurrent layers


def test_a_unit_of_a_recurrent_layer_goes_from_every_gate_layer_and_direction(networks):
    model, _, coupling = networks("lstm")
    site = next(s for s in coupling.sites if s.name == "rnn")
    owner = {part.key.removeprefix("rnn."): part.owner.flatten().tolist() for part in site.parts if part.axis == 0}
    assert owner["weight_ih_l0"] == owner["bias_hh_l1_reverse"] == list(range(8)) * 4  # four gates, one under another
    cut = removed(model, [site], {site.name: torch.arange(8) != 2})
    assert (cut.rnn.hidden_size, cut.rnn.proj_size, cut.rnn.input_size) == (7, 4, 6)
    assert cut.rnn.weight_hh_l1_reverse.shape == (28, 4)
    told = next(s for s in coupling.sites if s.name == "rnn.channel")  # what the projections tell: both directions
    (read,) = (part for part in told.parts if part.name == "fc.weight")
    assert read.owner.flatten().tolist() == [0, 1, 2, 3] * 2
    cut = removed(model, [told], {told.name: torch.arange(4) != 0})
    assert (cut.rnn.hidden_size, cut.rnn.proj_size, cut.fc.in_features) == (8, 3, 6)


def test_a_cut_recurrent_layer_trains_and_is_copied_whole(networks):
    model, batch, coupling = networks("rnn")
    cut = removed(model, coupling.sites, {"gru": some(24)})
    copy.deepcopy(cut)(*batch.inputs).sum().backward()  # computes with weights of its own
    assert all(p.grad is None for p in cut.parameters())
    cut(*batch.inputs).sum().backward()
    assert cut.gru.weight_hh_l1.grad.shape == (3 * 17, 17)
    assert all(a is b for a, b in zip(cut.gru._flat_weights, cut.gru.parameters(), strict=True))
    assert all(a is b for a, b in zip(model.gru._flat_weights, model.gru.parameters(), strict=True))


def test_a_first_state_of_zeros_is_made_as_wide_as_what_is_left():
    class Own(nn.Module):
        """The width is in an attribute that nobody knows."""

        def __init__(self):
            super().__init__()
            self.wide, self.gru, self.cell, self.fc = 8, nn.GRU(5, 8), nn.LSTMCell(8, 6), nn.Linear(6, 3)

        def forward(self, x):
            x = self.gru(x, torch.zeros(1, x.shape[1], self.wide))[0]
            state = None
            for step in x:
                state = self.cell(step, state)
            return self.fc(state[0])

    model, batch = lively(Own()), Batch((torch.randn(3, 2, 5),))
    coupling = couple(model, batch)
    assert {s.name: s.units for s in coupling.sites} == {"gru": 8, "cell": 6}
    assert [(n.attribute, n.per_unit) for n in coupling.sites[0].numbers] == [("wide", 1.0)]
    keep = {s.name: some(s.units) for s in coupling.sites}
    cut = removed(model, coupling.sites, keep)
    assert (cut.cell.input_size, cut.cell.hidden_size) == (6, 5)
    close(answer(masked(model, coupling.sites, keep), batch), answer(cut, batch))


def test_a_state_that_is_given_stays():
    class Given(nn.Module):
        def __init__(self):
            super().__init__()
            self.gru, self.fc = nn.GRU(5, 8), nn.Linear(8, 3)

        def forward(self, x, state):
            return self.fc(self.gru(x, state)[0])

    assert couple(Given().eval(), Batch((torch.randn(3, 2, 5), torch.randn(1, 2, 8)))).sites == ()


# Particulars of modules


def test_a_norm_without_weights_is_told_its_shape():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.norm, self.b = nn.Linear(5, 8), nn.LayerNorm(8, elementwise_affine=False), nn.Linear(8, 2)

        def forward(self, x):
            return self.b(self.norm(self.a(x)))

    model, batch = lively(Plain()), Batch((torch.randn(3, 5),))
    (site,) = couple(model, batch).sites
    assert [(n.module, n.attribute, n.per_unit) for n in site.numbers] == [("norm", "normalized_shape", 1.0)]
    assert removed(model, [site], {site.name: some(8)}).norm.normalized_shape == (6,)


def test_a_module_without_weights_that_counts_is_found_by_its_failure():
    class Back(nn.Module):
        def __init__(self):
            super().__init__()
            self.wide = 8

        def forward(self, x):
            return x.transpose(1, 2).reshape(len(x), self.wide, 2, 2)

    class Patches(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.back, self.b = nn.Linear(5, 8), Back(), nn.Conv2d(8, 2, 1)

        def forward(self, x):
            return self.b(self.back(self.a(x)))

    (site,) = couple(Patches().eval(), Batch((torch.randn(3, 4, 5),))).sites
    assert [(n.module, n.attribute, n.per_unit) for n in site.numbers] == [("back", "wide", 1.0)]


def test_sites_that_look_alike_but_for_their_width_are_each_tried():
    class Heads(nn.Module):
        def __init__(self, each):
            super().__init__()
            self.heads, self.total = 4, 4 * each
            self.a, self.mix, self.b = nn.Linear(6, 4 * each), nn.Linear(each, each), nn.Linear(4 * each, 6)

        def forward(self, x):
            return self.b(self.mix(self.a(x).view(len(x), self.heads, -1)).reshape(len(x), self.total))

    coupling = couple(nn.Sequential(Heads(2), Heads(3)).eval(), Batch((torch.randn(3, 6),)))
    totals = {(n.module, n.per_unit) for s in coupling.sites for n in s.numbers if n.attribute == "total"}
    assert totals == {("0", 2.0), ("1", 3.0)}


def test_a_weight_behind_a_weight_norm_is_cut():
    from torch.nn.utils.parametrizations import weight_norm

    model = lively(nn.Sequential(weight_norm(nn.Conv1d(3, 8, 3), dim=2), nn.ReLU(), nn.Conv1d(8, 2, 1)))
    batch = Batch((torch.randn(2, 3, 9),))
    (site,) = couple(model, batch).sites
    assert [part.name for part in site.parts] == ["0.weight.original1", "0.bias", "2.weight"]
    keep = {site.name: some(8)}
    cut = removed(model, [site], keep)
    assert cut[0].out_channels == 6
    close(answer(masked(model, [site], keep), batch), answer(cut, batch))


def test_a_width_written_into_the_code_is_not_offered():
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(5, 8), nn.Linear(4, 2)

        def forward(self, x):
            x = self.a(x)
            return self.b(x[:, :4] * x[:, 4:8])

    coupling = couple(Fixed().eval(), Batch((torch.randn(3, 5),)))
    assert coupling.sites == ()
    assert coupling.frozen[0].where == "a"
    assert "forward pass fails" in coupling.frozen[0].why


def test_widths_that_code_ties_by_a_number_alone_are_cut_together():
    class Reduced(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x):
            y = self.a(x)
            return self.c(self.b(y).reshape(len(x), y.shape[1])) + torch.sigmoid(y).sum()

    class Sized(Reduced):
        def forward(self, x):
            y = self.a(x)
            return self.c(self.b(y).reshape(len(x), y.shape[1], -1)[:, :, 0])

    model, batch = tiny.seeded(Sized, 0).eval(), Batch((torch.randn(3, 5),))
    coupling = couple(model, batch)
    assert coupling.frozen == ()
    (site,) = coupling.sites
    assert [part.name for part in site.parts] == ["a.weight", "a.bias", "b.weight", "b.weight", "b.bias", "c.weight"]
    keep = {site.name: some(8)}
    close(answer(masked(model, [site], keep), batch), answer(removed(model, [site], keep), batch))
    # what a unit at zero still adds to elsewhere is seen, as for any site
    assert couple(tiny.seeded(Reduced, 0).eval(), batch).sites == ()


def test_a_number_that_a_shared_config_holds_is_changed_in_a_copy():
    class Config:
        def __init__(self):
            self.num_heads, self.other = 4, 4

    class Mixed(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.config = config
            self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

        def forward(self, x):
            wide = self.config.num_heads * 2
            q, k, v = (self.qkv(x)[..., i * wide : i * wide + wide].unflatten(-1, (-1, 2)) for i in range(3))
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            return x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def make():
        config = Config()
        return nn.Sequential(Mixed(config), Mixed(config))

    model, batch = tiny.seeded(make, 0).eval(), Batch((torch.randn(3, 6, 8),))
    sites = couple(model, batch).of("head")
    assert [[(n.module, n.attribute, n.per_unit) for n in site.numbers] for site in sites] == [
        [("0", "config.num_heads", 1.0)],
        [("1", "config.num_heads", 1.0)],
    ]
    cut = removed(model, sites[:1], {sites[0].name: some(4)})
    assert [m.config.num_heads for m in cut] == [int(some(4).sum()), 4]
    assert model[0].config is model[1].config
    cut(*batch.inputs)


def test_a_cut_that_changes_the_answer_is_not_offered():
    class Shifted(nn.Module):
        """The mean over units, and one over how many there are: zeroing and removing differ."""

        def __init__(self):
            super().__init__()
            self.a = nn.Linear(5, 8)

        def forward(self, x):
            return torch.sigmoid(self.a(x)).sum(-1)

    coupling = couple(Shifted().eval(), Batch((torch.randn(3, 5),)))
    assert coupling.sites == ()
    assert "something else than with those at zero" in coupling.frozen[0].why


def test_a_forward_pass_that_depends_on_data_is_refused(capfd):
    class Jumpy(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(5, 8)

        def forward(self, x):
            return self.a(x) if bool(x.sum() > 0) else x

    with pytest.raises(GraphError, match=r"coupling of a Jumpy was asked for(.|\n)*torch.export cannot trace") as said:
        couple(Jumpy(), Batch((torch.randn(3, 5),)))
    assert "test_graph.py" in said.value.found
    assert "if bool(x.sum() > 0)" in said.value.found
    assert capfd.readouterr() == ("", "")


def test_a_number_of_the_module_is_found_by_trying():
    class Gated(nn.Module):
        """The width is kept under a name nobody knows."""

        def __init__(self):
            super().__init__()
            self.quux = 8
            self.a, self.b = nn.Linear(5, 16), nn.Linear(8, 2)

        def forward(self, x):
            gate, value = self.a(x).split(self.quux, -1)
            return self.b(torch.sigmoid(gate) * value)

    coupling = couple(Gated().eval(), Batch((torch.randn(3, 5),)))
    (site,) = coupling.sites
    assert site.units == 8
    assert [(n.module, n.attribute, n.per_unit) for n in site.numbers] == [("", "quux", 1.0)]


def test_removals_leave_out_what_is_kept_whole(networks):
    _, _, coupling = networks("mobilenet")
    whole = {s.name: torch.ones(s.units, dtype=torch.bool) for s in coupling.sites}
    assert removals(coupling.sites, whole) == []
    assert removals(coupling.sites, {}) == []
    (only,) = removals(coupling.sites, {"stem.0": some(8)})
    assert isinstance(only, Remove)
    assert isinstance(only.site, Site)


class Words(nn.Module):
    """A small network for tokens; what comes after the first 16 may count the neurons of its MLP."""

    def __init__(self, counts=False, length=None):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.embed, self.norm = nn.Embedding(20, 8), nn.LayerNorm(8)
            self.up, self.down, self.head = nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 5)
        self.counts, self.length, self.seen = counts, length, []

    def forward(self, ids):
        if self.length is not None and ids.shape[1] != self.length:
            raise ValueError("texts of one length only")
        self.seen.append(tuple(ids.shape))
        x = self.embed(ids)
        inner = torch.relu(self.up(self.norm(x)))
        later = torch.arange(ids.shape[1])[:, None] >= 16
        x = x + self.down(inner) + (later * inner.shape[-1] if self.counts else 0)
        return self.head(x)


def words(length):
    return Batch((torch.arange(2 * length).reshape(2, length) % 20,))


def test_a_cut_is_learned_on_the_first_tokens_and_tried_on_all():
    model = Words()
    found = couple(model, words(40))
    assert [site.name for site in found.sites] == ["down", "up"] and not found.frozen
    tried = model.seen[1:]  # the trace comes first
    assert {16, 40} == {length for _, length in tried} and tried[-1] == (2, 40)
    short = Words()
    couple(short, words(10))
    assert {length for _, length in short.seen} == {10}


def test_a_model_that_wants_whole_texts_gets_them():
    model = Words(length=40)
    assert [site.name for site in couple(model, words(40)).sites] == ["down", "up"]
    assert {length for _, length in model.seen} == {40}


def test_what_is_wrong_after_the_first_tokens_is_seen():
    found = couple(Words(counts=True), words(40))
    assert [site.name for site in found.sites] == ["down"]  # what a norm takes statistics over: zeros prove nothing
    assert [frozen.where for frozen in found.frozen] == ["up"]
    assert "gives something else" in found.frozen[0].why
