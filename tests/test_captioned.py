"""Pictures with captions: what a batch holds, how it is measured, what is refused; the CLIP that is trained on it."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from tiny import cnn, decoder
from torch import Tensor, nn
from two_towers import captioned, clip, trained_clip

from secateur.cli import main
from secateur.errors import SettingError, TaskError
from secateur.evidence import examples
from secateur.task import Task
from secateur.tasks import fashion_pairs, names, open_task
from secateur.tasks.captioned import FASHION, VIEWS, likeness, shown, tokens_of, worded
from tools.train_clip import cache, network, tokenizer


class Sure(nn.Module):
    """Finds the caption whose second token is nearest the picture's mean, or always the first."""

    def __init__(self, choice: int | None = None) -> None:
        super().__init__()
        self.choice, self.weight = choice, nn.Parameter(torch.zeros(1))

    def forward(self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        logits = torch.zeros(len(pixel_values), len(input_ids)) + self.weight
        if self.choice is not None:
            logits[:, self.choice] = 10.0
        return SimpleNamespace(logits_per_image=logits)


def test_a_batch_holds_pictures_all_captions_and_the_place_of_each_pictures_own() -> None:
    task = captioned(views=1)
    assert isinstance(task, Task)
    batch = next(iter(task.batches("calibration", 6)))
    assert batch.inputs["pixel_values"].shape == (6, 3, 8, 8)
    assert batch.inputs["input_ids"].shape == batch.inputs["attention_mask"].shape == (4, 5)
    assert batch.size == 6
    assert batch.tokens == 0
    assert bool((batch.target < 4).all())
    found = likeness(batch.through(clip()))
    assert found.shape == (6, 4)


def test_pictures_are_turned_and_inverted_by_view() -> None:
    picture = torch.tensor([[[[0, 10], [20, 255]]]], dtype=torch.uint8)
    four = shown(picture.expand(4, 1, 2, 2), torch.arange(4))
    expected = [[[0, 10], [20, 255]], [[20, 255], [0, 10]], [[255, 245], [235, 0]], [[235, 0], [255, 245]]]
    assert four.squeeze(1).tolist() == expected
    assert four.dtype == torch.uint8


def test_captions_say_class_and_view_in_the_order_of_targets() -> None:
    ways = worded(FASHION, 4)
    assert len(ways) == 15
    assert {len(way) for way in ways} == {40}
    assert ways[0][0] == "a picture of a t-shirt"
    assert ways[0][7 * 4 + 3] == "a picture of a sneaker upside down as a negative"
    assert ways[5][7 * 4] == "a picture of a trainer"
    assert len({text for way in ways for text in way}) == 15 * 40


def test_tokens_are_padded_at_the_end_and_masked() -> None:
    words = tokenizer()
    ids, mask = tokens_of([["a bag", "a bag upside down"]], words)
    assert ids.shape == mask.shape == (1, 2, 6)
    assert mask.sum(-1).tolist() == [[4, 6]]
    assert ids[0, 0, 0] == words.bos_token_id
    assert ids[0, 0, 3] == words.eos_token_id
    assert ids[0, 0, 4:].tolist() == [words.pad_token_id] * 2
    assert words.unk_token_id not in tokens_of(worded(FASHION, len(VIEWS)), words)[0]


def test_accuracy_and_loss_by_hand() -> None:
    task = captioned()
    labels = task.splits["val"][1]
    for choice in range(4):
        found = task.measure(Sure(choice))
        assert found["accuracy"] == pytest.approx(float((labels == choice).float().mean()))
        assert found["classes"] == found["accuracy"]
    even = task.measure(Sure())
    assert even["loss"] == pytest.approx(torch.tensor(4.0).log().item())
    assert (even["captions"], even["examples"]) == (4, 128)
    batch = task.example
    assert task.loss(Sure(), batch).item() == pytest.approx(even["loss"])


def test_views_are_part_of_the_caption_but_not_of_the_class() -> None:
    task = captioned()
    ids, mask = (torch.cat([t, t], 1) for t in (task.ids, task.mask))
    both = replace(task, ids=ids, mask=mask, views=2)
    found = both.measure(Sure(1))  # the first class, upside down
    labels = task.splits["val"][1]
    assert found["classes"] == pytest.approx(float((labels == 0).float().mean()))
    assert 0 < found["accuracy"] < found["classes"]
    assert both.measure(Sure(1)) == found  # views of val are fixed


def test_calibration_is_drawn_by_the_seed_and_words_change_from_batch_to_batch() -> None:
    task = captioned()

    def drawn(seed: int, split: str = "calibration") -> list[Tensor]:
        return [b.inputs["input_ids"] for b in replace(task, seed=seed).batches(split, 96)]

    assert all(torch.equal(a, b) for a, b in zip(drawn(0), drawn(0), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(drawn(0), drawn(1), strict=True))
    assert len({tuple(ids.flatten().tolist()) for ids in drawn(0)}) > 1
    assert len({tuple(ids.flatten().tolist()) for ids in drawn(0, "val")}) == 1
    fewer = next(iter(task.batches("calibration", 16))).inputs["pixel_values"]
    assert fewer.shape[0] == 16


def test_examples_taken_one_by_one_keep_all_captions_even_where_there_are_as_many_pictures() -> None:
    task = captioned(batch=4)
    batches = list(task.batches("calibration", 8))
    assert [b.size for b in batches] == [3, 1, 3, 1]
    for one in examples(batches):
        assert one.size == 1
        assert one.inputs["input_ids"].shape[0] == 4
        assert one.target.shape == (1,)


def test_what_does_not_fit_is_refused() -> None:
    task = captioned()
    with pytest.raises(TaskError, match=r"1,000 pictures of toy-captions's 'calibration' split(.|\n)*it holds 512"):
        list(task.batches("calibration", 1000))
    with pytest.raises(TaskError, match=r"split 'tset' of toy-captions was asked for(.|\n)*Did you mean test"):
        task.measure(Sure(), "tset")
    with pytest.raises(TaskError, match="was given 4 captions, but 4 classes in 2 views have 8"):
        replace(task, views=2)
    with pytest.raises(TaskError, match="there are 4 views"):
        replace(task, views=9)
    with pytest.raises(TaskError, match=r"without logits_per_image(.|\n)*such as CLIP"):
        likeness(SimpleNamespace(logits=torch.zeros(2, 2)))


def test_fingerprints_follow_pictures_captions_and_settings() -> None:
    task = captioned()
    assert captioned().fingerprint() == task.fingerprint()
    others = [captioned(seed=1), captioned(batch=16), replace(task, ids=task.ids + 1)]
    assert len({t.fingerprint() for t in [task, *others]}) == 4


def test_it_goes_by_the_name_captions_and_only_with_two_towers() -> None:
    assert "captions" in names()
    for model in (decoder(), cnn()):
        with pytest.raises(TaskError, match="does not take pictures and text together"):
            open_task("captions", tokenizer=tokenizer(), model=model)
    with pytest.raises(TaskError, match="there is no tokenizer"):
        open_task("captions", model=clip())
    with pytest.raises(SettingError, match=r"setting 'veiws'(.|\n)*Did you mean views"):
        open_task("captions", tokenizer=tokenizer(), veiws=2)
    with pytest.raises(TaskError, match="captions of 5 views"):
        fashion_pairs(tokenizer(), views=5)


def test_a_clip_learns_the_toy() -> None:
    assert captioned().measure(trained_clip())["accuracy"] > 0.8


def test_the_captions_of_fashion_mnist_fit_the_model_that_is_trained_on_them(data: Path) -> None:
    words = tokenizer()
    model = network(len(words), 0).eval()
    small = {"train_size": 64, "val_size": 40, "test_size": 20, "batch": 32}
    task = open_task("captions", tokenizer=words, model=model, **small)
    assert task.example.inputs["pixel_values"].shape == (2, 3, 28, 28)
    assert likeness(task.example.through(model)).shape == (2, 40)
    assert task.measure(model)["captions"] == 40
    with pytest.raises(TaskError, match=r"captions have up to \d+ tokens(.|\n)*belongs to the model"):
        open_task("captions", tokenizer=words, model=clip(), **small)


def test_the_trained_model_is_kept_outside_the_repository(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path))
    assert cache() == tmp_path
    monkeypatch.delenv("SECATEUR_CACHE")
    assert Path(__file__).parent.parent not in cache().parents


def test_a_folder_is_pruned_from_the_command_line(data: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, CLIPModel

    words = tokenizer()
    network(len(words), 0).save_pretrained(tmp_path / "clip")
    words.save_pretrained(tmp_path / "clip")
    options = [
        "--sparsity",
        "0.6",
        "--samples",
        "8",
        "--allocation.steepness.draws",
        "1",
        "--allocation.steepness.samples",
    ]
    options += ["8", "--allocation.steepness.together", "per-block", "--allocation.towers", "vision_model=0.55"]
    small = ["--task.train_size", "32", "--task.val_size", "16", "--task.batch", "8", "--json"]
    out = tmp_path / "pruned"
    done = CliRunner().invoke(main, ["prune", str(tmp_path / "clip"), "ecoflap", *options, *small, "--out", str(out)])
    assert done.exit_code == 0, done.output
    record = json.loads(done.stdout)
    assert record["task"]["name"] == "captions"  # the usual task of a CLIP
    assert record["settings"]["allocation"].startswith("ecoflap(steepness=")
    vision = [row for row in record["sites"] if row["site"].startswith("vision_model.")]
    assert 1 - sum(r["kept"] for r in vision) / sum(r["units"] for r in vision) == pytest.approx(0.55, abs=0.005)
    stock = CLIPModel.from_pretrained(out)
    zeros = sum(int((p == 0).sum()) for p in stock.parameters())
    assert zeros >= 0.6 * record["ledger"]["prunable"] - 2000
    assert len(AutoTokenizer.from_pretrained(out)) == len(words)
    wrong = CliRunner().invoke(
        main,
        [
            "prune",
            str(tmp_path / "clip"),
            "ecoflap",
            "--allocation.towers",
            "vison_model=0.5",
            *small[:-1],
            "--out",
            "x",
        ],
    )
    assert wrong.exit_code == 2
    assert "vision_model" in wrong.output
