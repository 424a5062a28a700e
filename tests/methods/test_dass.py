"""DASS (paper 4): cells and genotypes, sparse layers, steps of alpha, what each stage moves, what comes out."""

import copy
from dataclasses import replace

import pytest
import tiny
import torch
from torch import nn

from secateur.axes.cells import (
    NONE,
    OPERATIONS,
    SMALL,
    FoundCell,
    Genotype,
    SearchCell,
    Seat,
    Space,
    derived,
    drawn,
    parametric,
)
from secateur.axes.patterns import keep_top
from secateur.edit import Mask, Replace
from secateur.errors import EvidenceError, GraphError, SettingError, TaskError
from secateur.method import prune
from secateur.methods.dass import (
    DASS,
    Architect,
    Architecture,
    AsTheyAre,
    Chance,
    DenseSearch,
    Known,
    Layers,
    SparseSearch,
    Stages,
    Unrolled,
    divided,
    scaled_scores,
    stepped,
    unrolled_gradient,
)
from secateur.models import load, open_model, save
from secateur.models.cells import CellNetwork, cells_grey
from secateur.train import Loop, Snapshot, fit, seeded

TEXT = "normal sep_conv_3x3<0 skip_connect<1 | dil_conv_3x3<1 avg_pool_3x3<2; " + (
    "reduce skip_connect<0 sep_conv_3x3<1 | sep_conv_3x3<0 dil_conv_3x3<2"
)


def network(width=4, cells=2, space=SMALL, seed=0):
    """A supernet for the toy images: a normal cell and a reduction."""
    with seeded(nn.Linear(1, 1), seed):
        return CellNetwork(width, cells, space, classes=tiny.CLASSES)


def short(**changes):
    settings = {"layer_sparsity": 0.8, "search": SparseSearch(Stages(3, 2, 3)), "final": Stages(3, 2, 3), **changes}
    return DASS(**settings)


# Cells


@pytest.mark.parametrize("name", [name for name in OPERATIONS if name != NONE])
@pytest.mark.parametrize(("size", "half"), [(8, 4), (7, 4)])
def test_operations_keep_a_map_or_halve_it(name, size, half):
    seat = Seat(3, 3, 6, reduces=True)
    x = torch.randn(2, 6, size, size)
    assert seat.make(name, 0, affine=True)(x).shape == (2, 6, half, half)
    assert seat.make(name, 2, affine=True)(x).shape == x.shape
    assert parametric(name) == any(p.dim() > 1 for p in seat.make(name, 2, affine=False).parameters())


def test_shares_of_operations_mix_them_and_none_takes_its_own():
    space = Space(1, (NONE, "skip_connect", "sep_conv_3x3"))
    cell = SearchCell(Seat(2, 2, 2), space).eval()
    cell.alpha = torch.tensor([[0.0, 0.0, -torch.inf], [0.0, -torch.inf, -torch.inf]])
    x, y = torch.randn(2, 1, 2, 5, 5)
    # edge 0: half of it none, half of it the map itself; edge 1: none
    torch.testing.assert_close(cell(x, y), 0.5 * cell.first(x))
    cell.alpha = torch.zeros(2, 3)
    maps = cell.first(x), cell.second(x)
    mixed = sum((m + edge["sep_conv_3x3"](m)) / 3 for m, edge in zip(maps, cell.edges, strict=True))
    torch.testing.assert_close(cell(x), mixed)  # a lone map is read twice


def test_the_cell_found_is_the_one_searched_with_all_shares_on_one_operation():
    seat = Seat(3, 4, 2, reduces=True, shrunk=True)
    cell, genotype = SearchCell(seat, SMALL), Genotype.read(TEXT)
    alpha = torch.full((5, 5), -torch.inf)
    alpha[:, SMALL.operations.index(NONE)] = 0
    chosen = [0, 1, 2, 4]  # of node 0 its two edges; of node 1, edges 2 to 4, those from 0 and 2
    for edge, (name, _) in zip(chosen, [e for node in genotype.reduce for e in node], strict=True):
        alpha[edge] = -torch.inf
        alpha[edge, SMALL.operations.index(name)] = 0
    cell.alpha = alpha
    found = cell.found(genotype)
    state = {k.replace("edges", "was"): v for k, v in cell.state_dict().items()}
    for place, (edge, (name, _)) in enumerate(zip(chosen, [e for node in genotype.reduce for e in node], strict=True)):
        state |= {
            k.replace(f"edges.{edge}.{name}.", f"edges.{place}."): v
            for k, v in cell.state_dict().items()
            if f"edges.{edge}.{name}." in k
        }
    missing = found.load_state_dict(state, strict=False).missing_keys
    assert all("norm" in key for key in missing)  # weights of norms, which are ones and zeros
    x, y = torch.randn(2, 3, 9, 9), torch.randn(2, 4, 5, 5)
    torch.testing.assert_close(found(x, y), cell(x, y))
    built = FoundCell(**found.settings())
    assert built.wires == found.wires
    assert {k: v.shape for k, v in built.state_dict().items()} == {k: v.shape for k, v in found.state_dict().items()}


def test_a_genotype_takes_two_edges_a_node_and_never_none():
    operations = (NONE, "skip_connect", "sep_conv_3x3")
    share = torch.tensor(
        [
            [0.9, 0.06, 0.04],  # node 0: edges 0 and 1, whatever they have
            [0.2, 0.3, 0.5],
            [0.1, 0.4, 0.5],  # node 1: the best of edges 2 to 4 without none are 0.5, 0.45 and 0.5
            [0.1, 0.45, 0.45],
            [0.0, 0.5, 0.5],
        ]
    )
    wires = derived(share, operations)
    assert wires[0] == (("skip_connect", 0), ("sep_conv_3x3", 1))
    assert wires[1] == (("sep_conv_3x3", 0), ("skip_connect", 2))  # of equal operations the first
    with pytest.raises(SettingError, match="would have 1 of its 3 predecessors"):
        derived(share[:3], operations)
    with pytest.raises(SettingError, match="would have 1 of its 2 predecessors"):
        derived(share[:1], operations)


def test_a_genotype_is_text_and_back():
    genotype = Genotype.read(TEXT)
    assert str(genotype) == TEXT
    assert Genotype.read(str(genotype)) == genotype
    assert genotype.share == 5 / 8
    assert Genotype.read(TEXT.split(";")[0]).reduce == ()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "it is empty"),
        ("normal none<0 skip_connect<1", "has an edge of 'none'"),
        ("normal skip_connect<1", "node 0 has 1 predecessor"),
        ("normal skip_connect<1 sep_conv_3x3<1", "node 0 has 1 predecessor"),
        ("normal skip_connect<0 skip_connect<2", "which comes later"),
        ("normal skip_conect<0 skip_connect<1", "no operation 'skip_conect'"),
        ("normal skip_connect", "is no edge"),
        ("odd skip_connect<0 skip_connect<1", "is no kind of cell"),
    ],
)
def test_genotypes_that_cannot_be_are_refused(text, says):
    with pytest.raises(SettingError, match=says):
        Genotype.read(text)
    with pytest.raises(SettingError):
        short(search=Known(text)).check()


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ((0, ("sep_conv_3x3",)), "one node at least"),
        ((2, (NONE, "skip_connect", "max_pool_3x3")), "none of them has weights"),
        ((2, ()), "none of them has weights"),
        ((2, ("sep_conv_3x3", "sep_conv_3x3")), "named twice"),
        ((2, ("sep_conv_9x9",)), "no operation 'sep_conv_9x9'"),
    ],
)
def test_spaces_that_cannot_be_are_refused(given, says):
    with pytest.raises(SettingError, match=says):
        Space(*given)


def test_cells_by_chance_are_legal_and_of_the_seed():
    first, again = (drawn(Space(), torch.Generator().manual_seed(3)) for _ in range(2))
    assert first == again
    other = drawn(Space(), torch.Generator().manual_seed(4))
    assert first != other
    assert Genotype.read(str(Genotype(first, other))) == Genotype(first, other)


# Sparse layers


def test_first_scores_are_the_weights_scaled_by_what_a_layer_reads():
    weight = torch.tensor([[1.0, -2.0, 0.5], [0.0, 4.0, 1.0]])
    assert torch.equal(scaled_scores(weight), 2**0.5 * weight / 4)  # fan_in 3
    assert torch.equal(scaled_scores(torch.zeros(2, 3)), torch.zeros(2, 3))


def test_of_n_weights_all_but_a_whole_number_stay_and_channels_can_be_spared():
    model = nn.Sequential(nn.Conv2d(16, 16, 3, groups=16, bias=False))
    (site,) = Layers(0.99).sites(model)
    assert Layers(0.99).kept(site) == 144 - 142
    assert Layers(0.99, least=1).kept(site) == 16
    assert Layers(0.99, least=20).kept(site) == 144
    assert Layers(0.0).kept(site) == 144
    keep = Layers(0.99).rule(model).keep["0.weight"]
    assert torch.equal(keep, keep_top(model[0].weight.abs().reshape(-1), 2).reshape(keep.shape))
    with torch.no_grad():
        model[0].weight.zero_()
    assert int(Layers(0.99).rule(model).keep["0.weight"].sum()) == 2  # all scores alike: the index decides


# The step of alpha


def test_the_unrolled_gradient_by_hand():
    """L_train = (w - alpha)^2 / 2 and L_held = w'^2 / 2: w' = w - xi (w - alpha), and dL_held/dalpha = xi w'."""
    alpha, w = torch.tensor([3.0], requires_grad=True), torch.tensor([1.0], requires_grad=True)

    def found(**more):
        return unrolled_gradient(
            [alpha], [w], 0.1, lambda: ((w - alpha) ** 2 / 2).sum(), lambda: (w**2 / 2).sum(), **more
        )

    torch.testing.assert_close(found(), [torch.tensor([0.1 * 1.2])], rtol=1e-3, atol=1e-4)
    # momentum 0.5 of a past step of 2, and a decay of 1: w' = 1 - 0.1 (1 - 2 + 1) = 1
    torch.testing.assert_close(
        found(moves=lambda weight, slope: 1.0 + slope + weight.detach()), [torch.tensor([0.1])], rtol=1e-3, atol=1e-4
    )
    # a masked weight does not answer
    torch.testing.assert_close(found(stays=lambda weight: torch.tensor([False])), [torch.tensor([0.0])])
    assert w.item() == 1.0
    assert w.grad is None
    assert alpha.grad is None


def test_the_next_step_is_what_sgd_would_take():
    weight = nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = torch.optim.SGD([weight], 0.1, momentum=0.9, weight_decay=0.01)
    for _ in range(2):
        weight.grad = torch.tensor([0.5, 1.0])
        before, step = weight.detach().clone(), stepped(optimizer)[weight](weight.grad)
        optimizer.step()
        torch.testing.assert_close(weight.detach(), before - 0.1 * step)


@pytest.mark.parametrize("answer", [AsTheyAre(), Unrolled()])
def test_a_step_of_alpha_leaves_everything_else_as_it_was(answer):
    model, task = network(), tiny.toy_images()
    found = Architecture(model, torch.Generator().manual_seed(0))
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert not held & {id(alpha) for alpha in found.alpha.values()}
    batch = next(iter(task.batches("train")))
    loop = Loop(model.train(), optimizer, 1, task, batch=batch)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    before = {k: v.clone() for k, v in found.alpha.items()}
    rule = Architect(found, task, answer)
    rule.start(loop)
    rule.before_forward(loop)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    for kind, alpha in found.alpha.items():
        assert not torch.equal(alpha, before[kind])
        assert alpha.grad is None
        assert not alpha.requires_grad
    assert set(found.alpha) == {"normal", "reduce"}


def test_a_step_of_alpha_that_fails_leaves_the_stage_as_it_was():
    model, task = network(), tiny.toy_images()
    found = Architecture(model, torch.Generator().manual_seed(0))
    loop = Loop(model, torch.optim.SGD(model.parameters(), 0.1), 1, task, batch=task.example)
    state = {k: v.clone() for k, v in model.state_dict().items()}

    def wrong():
        raise KeyError("held")

    with pytest.raises(KeyError):
        found.step(lambda alphas: Unrolled().gradients(loop, alphas, wrong))
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert not any(alpha.requires_grad for alpha in found.alpha.values())
    assert all(m.track_running_stats for m in model.modules() if isinstance(m, nn.BatchNorm2d))


def test_a_gradient_that_is_no_number_moves_nothing():
    found = Architecture(network(), torch.Generator().manual_seed(0))
    before = {k: v.clone() for k, v in found.alpha.items()}
    with pytest.raises(EvidenceError, match="NaN or infinity"):
        found.step(lambda alphas: [torch.full_like(alpha, torch.nan) for alpha in alphas])
    assert all(torch.equal(v, before[k]) for k, v in found.alpha.items())


def test_alpha_answers_to_the_masked_network():
    """One step of fine-tuning: the gradient that alpha sees is that of the masked weights, not of the dense ones."""
    task, layers = tiny.toy_images(), Layers(0.9)
    seen = []

    class Watched:
        def gradients(self, loop, alphas, held):
            seen.append(AsTheyAre().gradients(loop, alphas, held))
            return seen[-1]

    model = network()
    found = Architecture(model, torch.Generator().manual_seed(0))
    dense = copy.deepcopy(model)
    Stages(0, 0, 1).run(model, task, layers, [Architect(found, task, Watched())])
    (given,) = seen

    def by_hand(net):
        alphas = {cell.seat.kind: cell.alpha.detach().requires_grad_() for cell in net.cells}
        for cell in net.cells:
            cell.alpha = alphas[cell.seat.kind]
        loss = task.loss(net.train(), next(iter(task.batches("train"))))
        return torch.autograd.grad(loss, [alphas[kind] for kind in sorted(alphas)])

    masked = copy.deepcopy(dense)
    with torch.no_grad():
        for site in layers.sites(masked):
            weight = masked.get_parameter(site.name)
            keep = keep_top(weight.abs().reshape(-1), layers.kept(site)).reshape(weight.shape)
            weight.mul_(keep)
    for seen_, masked_, dense_ in zip(given, by_hand(masked), by_hand(dense), strict=True):
        torch.testing.assert_close(seen_, masked_)
        assert float((seen_ - dense_).norm()) > 0.1 * float(dense_.norm())


def test_a_masked_weight_stays_zero_in_the_unrolled_step_too():
    model, task = network(), tiny.toy_images()
    found = Architecture(model, torch.Generator().manual_seed(0), rate=0.1)
    before = {k: v.clone() for k, v in found.alpha.items()}
    seen = []

    class Looking:
        def gradients(self, loop, alphas, held):
            def look():
                seen.append(sum(int((p == 0).sum()) for p in loop.model.parameters() if p.dim() > 1))
                return held()

            return Unrolled().gradients(loop, alphas, look)

    masks, _ = Stages(0, 0, 2).run(model, task, Layers(0.8), [Architect(found, task, Looking())])
    gone = sum(m.site.units - m.kept for m in masks)
    assert seen == [gone, gone]
    assert any(not torch.equal(v, before[k]) for k, v in found.alpha.items())


# Stages


def test_masks_are_searched_while_weights_and_alpha_stand_still():
    model, task, layers = network(), tiny.toy_images(), Layers(0.7)
    found = Architecture(model, torch.Generator().manual_seed(0))
    weights = {k: v.detach().clone() for k, v in model.named_parameters()}
    alpha = {k: v.clone() for k, v in found.alpha.items()}
    first = layers.rule(model).keep
    masks, history = Stages(0, 6, 0, score_rate=1.0).run(model, task, layers, [Architect(found, task, AsTheyAre())])
    assert all(torch.equal(v, alpha[k]) for k, v in found.alpha.items())
    kept = {m.site.name: m.keep for m in masks}
    for name, value in model.named_parameters():
        was = weights[name]
        assert torch.equal(value, torch.where(kept[name], was, torch.zeros(())) if name in kept else was), name
    assert any(not torch.equal(kept[name], first[name]) for name in kept)  # the search moved them
    assert all(m.kept == layers.kept(m.site) for m in masks)
    assert len(history.losses) == 6


def test_no_gradient_of_pretraining_reaches_the_scores():
    task, layers = tiny.toy_images(), Layers(0.7)
    first, again = network(), network()
    Stages().dense(first, task, 2)
    again.load_state_dict(first.state_dict())  # the same weights, without the gradients
    masks, plain = (Stages(0, 1, 0, score_rate=1.0).run(model, task, layers)[0] for model in (first, again))
    assert all(torch.equal(a.keep, b.keep) for a, b in zip(masks, plain, strict=True))


def test_scores_of_either_sign_stay_by_their_size():
    model, task, layers = network(), tiny.toy_images(), Layers(0.7)
    first = layers.rule(model).keep
    masks, _ = Stages(0, 2, 0, score_rate=1e-9).run(model, task, layers)
    assert all(torch.equal(m.keep, first[m.site.name]) for m in masks)


def test_nothing_is_masked_at_a_sparsity_of_none():
    model, task = network(), tiny.toy_images()
    masks, _ = Stages(1, 1, 1).run(model, task, Layers(0.0))
    assert all(bool(m.keep.all()) for m in masks)


def test_a_dense_search_masks_nothing_and_takes_as_many_steps():
    model, task = network(), tiny.toy_images()
    _, history, notes = DenseSearch(Stages(2, 1, 2)).find(model, task, Layers(0.9))
    assert len(history.losses) == 5
    assert not any(bool((p == 0).any()) for p in model.parameters() if p.dim() > 1)
    assert [n.split()[5] for n in notes] == ["normal", "reduce"]


def test_a_search_lowers_the_loss_and_the_entropy():
    model, task = network(), tiny.toy_images()
    found = Architecture(model, torch.Generator().manual_seed(0), rate=0.02)
    before = {kind: found.entropy(kind) for kind in found.alpha}
    history = fit(model, task, 25, [Architect(found, task, AsTheyAre())])
    assert sum(history.losses[-5:]) < sum(history.losses[:5])
    assert all(found.entropy(kind) < before[kind] for kind in before)
    assert [step for step, _ in history.curves["entropy of normal cells"]] == [10, 20, 25]


def test_a_search_is_taken_up_where_it_was(tmp_path):
    task, steps = tiny.toy_images(), 9
    mine, held = divided(task, 0.25)  # six batches of held-out data: the run goes into a second epoch of it
    whole, part, again = network(), network(), network(seed=5)
    found = [
        Architecture(m, torch.Generator().manual_seed(s), rate=0.02) for m, s in ((whole, 0), (part, 0), (again, 3))
    ]

    def sgd(model):
        return torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)

    def write(loop):
        if loop.step == 7:
            Snapshot.of(part, loop).save(tmp_path / "run.safetensors")

    fit(whole, mine, steps, [Architect(found[0], held, AsTheyAre())], sgd(whole))
    fit(part, mine, 7, [Architect(found[1], held, AsTheyAre())], sgd(part), watch=write)
    saved = Snapshot.load(tmp_path / "run.safetensors")
    fit(again, mine, steps, [Architect(found[2], held, AsTheyAre())], sgd(again), resume_from=saved)
    assert all(torch.equal(v, found[2].alpha[k]) for k, v in found[0].alpha.items())
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in whole.state_dict().items())


# Data


def test_weights_and_alpha_are_trained_on_different_examples():
    task = tiny.toy_images()
    mine, held = divided(task, 0.25)
    rows = [{tuple(x.flatten()[:5].tolist()) for x in t.splits["train"][0]} for t in (mine, held)]
    assert [len(r) for r in rows] == [576, 192]
    assert not rows[0] & rows[1]
    mine, held = divided(task, 0)
    assert mine is task
    assert torch.equal(held.splits["train"][0], task.splits["val"][0])


def test_data_that_leaves_a_part_empty_is_refused():
    task = tiny.toy_images()
    none = tuple(x[:0] for x in task.splits["val"])
    with pytest.raises(TaskError, match="is empty"):
        divided(replace(task, splits={**task.splits, "val": none}), 0)
    one = tuple(x[:1] for x in task.splits["train"])
    with pytest.raises(TaskError, match="that is 0 of 1"):
        divided(replace(task, splits={**task.splits, "train": one}), 0.5)
    with pytest.raises(SettingError, match="cannot be divided"):
        divided(tiny.toy_text(), 0.5)


def test_frozen_layers_are_refused_before_any_step():
    model = network()
    model.stem.requires_grad_(False)
    with pytest.raises(SettingError, match=r"stem.weight has requires_grad=False"):
        prune(model, short(), tiny.toy_images())
    before, after = model.stem.weight, prune(model, short(exclude=("stem",)), tiny.toy_images()).model.stem.weight
    assert torch.equal(before, after)


# The whole


def test_the_network_found_has_the_masks_and_the_genotype_that_are_said():
    task, model = tiny.toy_images(), network()
    method = short(layer_sparsity=0.9, least=1.0)
    outcome = prune(model, method, task)
    said = next(note for note in outcome.notes if note.startswith("genotype: ")).removeprefix("genotype: ")
    genotype = Genotype.read(said)
    for cell in outcome.model.cells:
        assert cell.wires == genotype.of(cell.seat.kind)
    masks = [e for e in outcome.edits if isinstance(e, Mask) and e.site.kind == "weight"]
    sites = {site.name for site in method.layers.sites(outcome.model)}
    assert {m.site.name for m in masks} == sites  # every kernel and the classifier
    for mask in masks:
        assert mask.kept == method.layers.kept(mask.site)
        weight = outcome.model.get_parameter(mask.site.name)
        assert bool((weight[~mask.keep] == 0).all())
    assert outcome.record.ledger.removed <= outcome.record.ledger.prunable
    assert said in " ".join(outcome.record.notes)
    assert method.training_steps() == len(outcome.history.losses) == 16


def test_a_known_genotype_is_built_as_it_is_and_chance_is_of_the_seed():
    task = tiny.toy_images()
    outcome = prune(network(width=6), short(search=Known(TEXT)), task)
    assert outcome.notes[0] == f"genotype: {TEXT}"
    assert outcome.model.cells[1].seat.width == 12
    found = {
        prune(network(), short(search=Chance(), final=Stages(0, 0, 0)), tiny.toy_images(seed=seed)).notes[0]
        for seed in (0, 0, 1)
    }
    assert len(found) == 2
    with pytest.raises(SettingError, match="the genotype has 2 nodes for that kind"):
        prune(network(space=replace(SMALL, nodes=3)), short(search=Known(TEXT)), task)


def test_what_comes_out_is_saved_and_opened_again(tmp_path):
    outcome = prune(model := network(), short(), task := tiny.toy_images())
    save(outcome, None, tmp_path / "found")
    again = load(tmp_path / "found", build=lambda: network(seed=5))
    example = task.example
    assert torch.equal(example.through(again), example.through(outcome.model.eval()))
    assert not any(isinstance(m, SearchCell) for m in again.modules())
    assert any(isinstance(m, SearchCell) for m in model.modules())


def test_cells_have_a_name_and_open_from_a_folder_without_code(tmp_path):
    opened = open_model("cells-grey")
    assert sum(p.numel() for p in opened.model.parameters()) == sum(p.numel() for p in cells_grey().parameters())
    outcome = short(search=Known(TEXT), final=Stages(0, 0, 0)).run(copy.deepcopy(opened.model), tiny.toy_images())
    save(outcome, opened, tmp_path / "found")
    again = open_model(str(tmp_path / "found")).model
    x = torch.randn(2, 1, 14, 14)
    assert torch.equal(again(x), outcome.model.eval()(x))


def test_cells_take_the_places_of_blocks_and_the_rest_stays():
    model, task = tiny.trained("cnn"), tiny.toy_images()
    outcome = prune(model, short(space=Space(2, ("skip_connect", "sep_conv_3x3")), final=Stages(0, 0, 0)), task)
    assert [e.name for e in outcome.edits if isinstance(e, Replace)] == ["block1", "block2"]
    keep = {e.site.name: e.keep for e in outcome.edits if isinstance(e, Mask)}
    assert torch.equal(outcome.model.conv.weight, model.conv.weight * keep["conv.weight"])
    # what went: the blocks' 1,184 and 4,672 weights, and four fifths of those of what stays
    ledger = outcome.record.ledger
    assert ledger.prunable == 1184 + 4672 + 216 + 1152 + 64
    stands = sum(int(k.sum()) for name, k in keep.items() if name.startswith("block"))  # for some of what went
    assert ledger.removed == 1184 + 4672 + sum(int(0.8 * n) for n in (216, 1152, 64)) - stands
    with pytest.raises(GraphError, match="no two modules are alike"):
        prune(tiny.trained("mlp"), short(), tiny.toy_vectors())
    with pytest.raises(GraphError, match=r"block1 maps \[2, 8, 8, 8\] to \[2, 8, 8, 8\]"):
        prune(model, short(space=Space(3, ("sep_conv_3x3",))), task)
    once = short(search=Chance(), final=Stages(0, 0, 0)).run(network(cells=3), task).model
    with pytest.raises(GraphError, match=r"cells.0 reads 2 maps"):
        prune(once, short(), task)  # the cells of a search are no blocks that a cell of one map could stand for


@pytest.mark.parametrize("answer", [AsTheyAre(), Unrolled()])
def test_cells_are_found_and_built_in_half_precision(answer):
    task = tiny.toy_images()
    task = replace(task, splits={k: (x.bfloat16(), *rest) for k, (x, *rest) in task.splits.items()})
    for model in (network(), tiny.trained("cnn")):
        method = short(search=SparseSearch(Stages(1, 1, 1), answer), final=Stages(1, 1, 1), space=SMALL)
        outcome = prune(copy.deepcopy(model).bfloat16(), method, task)
        assert {p.dtype for p in outcome.model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"layer_sparsity": 1.0}, "in \\[0, 1\\)"),
        ({"layer_sparsity": -0.1}, "in \\[0, 1\\)"),
        ({"least": -1.0}, "least=-1"),
        ({"final": Stages(prune=-1)}, "cannot be negative"),
        ({"search": SparseSearch(Stages(rate=0.0))}, "it is above 0"),
        ({"search": SparseSearch(rate=float("nan"))}, "it is above 0"),
        ({"search": DenseSearch(held=1.0)}, "it is a fraction"),
        ({"search": DenseSearch(decay=-1.0)}, "it is 0 or more"),
        ({"final": Stages(decay=float("nan"))}, "it is 0 or more"),
        ({"final": Stages(momentum=1.0)}, "a momentum of 1"),
        ({"search": SparseSearch(Stages(momentum=float("nan")))}, "a momentum of nan"),
        ({"search": Known("normal")}, "node 0 has 0 predecessor"),
    ],
)
def test_bad_settings_are_refused_before_any_data_is_read(changes, says):
    with pytest.raises(SettingError, match=says):
        short(**changes).check()
    with pytest.raises(SettingError):
        Unrolled(0.0)


def test_a_network_without_room_for_cells_is_refused():
    with pytest.raises(SettingError, match="two channels in each node"):
        CellNetwork(1)
