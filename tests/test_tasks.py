"""Ready-made tasks: the same data for the same seed, disjoint parts, right numbers, errors that say what to do."""

import gzip
import importlib.util
import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import tiny
import torch
from torch import Tensor, nn

from secateur import tasks
from secateur.errors import SettingError, TaskError
from secateur.task import Task, logits_of
from secateur.tasks import Adam, AdamW, Characters, Labelled, Sgd, Text, open_task
from secateur.tasks.images import crop_and_flip
from secateur.train import fit

LETTERS = Characters([chr(i) for i in range(32, 127)] + ["\n"])


def rows(task: Task, split: str, n: int | None = None, epoch: int = 0) -> Tensor:
    return torch.cat([batch.inputs[0] for batch in task.batches(split, n, epoch)])  # type: ignore[index]


class Fixed(nn.Module):
    """Gives the same logits at each place, whatever it is shown."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, ids: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.logits.expand(*ids.shape, -1))


# Text


def hand_made(**changes: object) -> Text:
    return Text("hand", {"val": torch.tensor([0, 1, 1, 1, 0, 0, 0, 1]), "train": torch.arange(40)}, window=4, **changes)  # type: ignore[arg-type]


def test_perplexity_of_a_case_worked_by_hand() -> None:
    # Token 1 has chance 3/4 and token 0 has 1/4. The windows [0 1 1 1] and [0 0 0 1] predict 1 1 1 and 0 0 1:
    # four ones and two zeros.
    model = Fixed(torch.tensor([1 / 4, 3 / 4]).log())
    found = hand_made().measure(model)
    assert found["nll"] == pytest.approx(-(4 * math.log(3 / 4) + 2 * math.log(1 / 4)) / 6)
    assert found["perplexity"] == pytest.approx(math.exp(found["nll"]))
    assert (found["tokens"], found["window"], found["windows"]) == (6, 4, 2)


def test_loss_predicts_the_next_token_of_each_and_agrees_with_the_measurement() -> None:
    task = hand_made(batch=2)
    model = Fixed(torch.tensor([1 / 4, 3 / 4]).log())
    (batch,) = task.batches("val")
    assert float(task.loss(model, batch).detach()) == pytest.approx(task.measure(model)["nll"])
    ids = torch.tensor([[0, 1, 2, 3]])
    shifted = SimpleNamespace(logits=50.0 * nn.functional.one_hot(ids + 1, 5).float())
    model.forward = lambda _: shifted  # type: ignore[assignment]
    assert float(task.loss(model, replace(batch, inputs=(ids,)))) < 1e-6


def test_perplexity_is_computed_in_float32_for_bfloat16_models() -> None:
    logits = torch.tensor([0.25, 0.75]).log()
    half = Fixed(logits.bfloat16())
    expected = hand_made().measure(Fixed(half.logits.detach().float()))
    assert hand_made().measure(half)["nll"] == pytest.approx(expected["nll"], abs=1e-7)


def test_a_hopeless_or_broken_model_has_an_infinite_or_undefined_perplexity() -> None:
    assert hand_made().measure(Fixed(torch.tensor([0.0, -4000.0])))["perplexity"] == math.inf
    assert math.isnan(hand_made().measure(Fixed(torch.tensor([math.nan, 0.0])))["perplexity"])


def test_a_limit_on_the_windows_takes_the_first_ones() -> None:
    found = hand_made(windows=1).measure(Fixed(torch.tensor([0.5, 0.5]).log()))
    assert (found["windows"], found["tokens"]) == (1, 3)
    assert rows(hand_made(windows=1), "val").tolist() == [[0, 1, 1, 1]]


def test_measuring_does_not_depend_on_the_batch_and_leaves_the_mode_alone() -> None:
    model = tiny.decoder()
    model.train()
    model.model.layers[0].eval()
    one, many = (tiny.toy_text(batch=b).measure(model) for b in (1, 8))
    assert one["nll"] == pytest.approx(many["nll"], rel=1e-5)
    assert model.training
    assert not model.model.layers[0].training


def test_windows_of_an_epoch_do_not_overlap_and_each_epoch_has_its_own_order() -> None:
    task = hand_made()
    first, second = rows(task, "train"), rows(task, "train", epoch=1)
    assert sorted(first.flatten().tolist()) == list(range(40))
    assert not torch.equal(first, second)
    assert torch.equal(second, rows(hand_made(), "train", epoch=1))


def test_calibration_is_drawn_by_the_seed_alone_and_a_smaller_draw_is_a_prefix() -> None:
    task = tiny.toy_text()
    drawn = rows(task, "calibration", 40)
    list(task.batches("train"))
    assert torch.equal(drawn, rows(task, "calibration", 40))
    assert torch.equal(drawn[:13], rows(tiny.toy_text(), "calibration", 13))
    assert not torch.equal(drawn, rows(tiny.toy_text(seed=1), "calibration", 40))
    assert torch.equal(rows(task, "test"), rows(tiny.toy_text(seed=1), "test"))


def test_asking_for_more_windows_than_there_are_is_an_error() -> None:
    with pytest.raises(TaskError) as error:
        list(hand_made().batches("train", 11))
    assert str(error.value) == (
        "11 windows of 4 tokens of hand's 'train' split were asked for, but it holds 40 tokens, which make 10.\n"
        "Ask for fewer windows or shorter ones, or give more text."
    )


def test_an_unknown_split_names_the_ones_there_are() -> None:
    with pytest.raises(TaskError, match=r"split 'vall' of hand was asked for(.|\n)*Did you mean val\?"):
        list(hand_made().batches("vall"))


def test_a_window_longer_than_a_split_is_an_error() -> None:
    with pytest.raises(TaskError, match=r"its 'val' split has 10 tokens of the 100 in all"):
        tasks.from_text("abcdefgh\n\n" * 10, LETTERS, window=20)
    with pytest.raises(TaskError, match="windows of 9 tokens of hand's 'val' split were asked for, but it holds 8"):
        replace(hand_made(), window=9).measure(tiny.decoder())
    with pytest.raises(TaskError, match="a window predicts from two tokens on"):
        replace(hand_made(), window=1)


def test_empty_text_and_no_tokenizer_are_errors() -> None:
    with pytest.raises(TaskError, match=r"task 'text' was asked for, but its text is empty\."):
        tasks.from_text(" \n\n ", LETTERS)
    with pytest.raises(TaskError, match=r"there is no tokenizer(.|\n)*Give the model's tokenizer"):
        open_task("python-docs")


def test_fingerprints_follow_data_and_settings() -> None:
    one = tiny.toy_text()
    other_ids = {**one.ids, "val": one.ids["val"].flip(0)}
    different = [one, tiny.toy_text(seed=1), tiny.toy_text(window=8), replace(one, ids=other_ids)]
    assert len({task.fingerprint() for task in different}) == 4
    assert one.fingerprint() == tiny.toy_text().fingerprint()


# Texts


def test_python_docs_need_no_download_and_no_topic_is_in_two_splits() -> None:
    from pydoc_data.topics import topics

    class Whole:
        """Remembers the texts it is given."""

        def __init__(self) -> None:
            self.texts: list[str] = []

        def encode(self, text: str) -> list[int]:
            self.texts.append(text)
            return LETTERS.encode(text)

    seen = Whole()
    task = tasks.python_docs(seen)
    assert set(task.ids) == {"train", "calibration", "val", "test"}
    for name, topic in topics.items():
        if topic.strip():
            assert sum(topic in text for text in seen.texts) == 1, name
    total = sum(map(len, task.ids.values()))
    for split, share in {"train": 0.4, "calibration": 0.3, "val": 0.1, "test": 0.2}.items():
        assert len(task.ids[split]) / total == pytest.approx(share, abs=0.06)


def test_one_long_text_is_cut_into_disjoint_parts_in_order() -> None:
    words = [f"w{i:04d}" for i in range(2000)]
    for joined in ("\n\n".join(words), "\n".join(words), " ".join(words)):
        task = tasks.from_text(joined, LETTERS, window=16)
        characters = list(LETTERS.vocabulary)
        parts = ["".join(characters[i] for i in task.ids[s].tolist()) for s in ("train", "calibration", "val", "test")]
        assert "".join(parts) == joined
        assert [len(part) / len(joined) for part in parts] == pytest.approx([0.4, 0.3, 0.1, 0.2], abs=0.01)
        assert all(len(word) == 5 for part in parts for word in part.split())  # no word is cut in two


def test_many_documents_stay_whole() -> None:
    documents = [f"{i:02d} " * 30 for i in range(37)]  # no cut falls between two of them
    task = tasks.from_text(documents, LETTERS, window=16)
    characters = list(LETTERS.vocabulary)
    seen = [set("".join(characters[i] for i in stream.tolist()).split()) for stream in task.ids.values()]
    assert sum(map(len, seen)) == 37


def test_texts_are_read_from_files_and_folders(tmp_path: Path) -> None:
    text = "\n\n".join(["one two three four five"] * 60)
    (tmp_path / "plain.txt").write_text(text)
    (tmp_path / "packed.txt.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "lines.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in text.split("\n\n")))
    (tmp_path / "picture.png").write_bytes(b"\xff\xfe\xfd")
    one = open_task(str(tmp_path / "plain.txt"), tokenizer=LETTERS, window="16")
    assert one.name == "plain"
    assert one.window == 16  # type: ignore[union-attr]
    same = open_task(str(tmp_path / "packed.txt.gz"), tokenizer=LETTERS, window=16)
    lines = open_task(str(tmp_path / "lines.jsonl"), tokenizer=LETTERS, window=16)
    for split in ("train", "test"):
        assert torch.equal(one.ids[split], same.ids[split])  # type: ignore[union-attr]
        assert torch.equal(one.ids[split], lines.ids[split])  # type: ignore[union-attr]
    whole = open_task(str(tmp_path), tokenizer=LETTERS, window=16)
    assert sum(map(len, whole.ids.values())) > 2 * sum(map(len, one.ids.values()))  # type: ignore[union-attr]


def test_files_that_are_no_text_are_errors(tmp_path: Path) -> None:
    (tmp_path / "picture.txt").write_bytes(b"\xff\xfe\xfd")
    (tmp_path / "lines.jsonl").write_text('{"words": 3}\n')
    (tmp_path / "empty").mkdir()
    with pytest.raises(TaskError, match="it is not UTF-8"):
        tasks.from_path(tmp_path / "picture.txt", LETTERS)
    with pytest.raises(TaskError, match="a line of it is not JSON with a text"):
        tasks.from_path(tmp_path / "lines.jsonl", LETTERS)
    with pytest.raises(TaskError, match="the folder has no text files"):
        tasks.from_path(tmp_path / "empty", LETTERS)
    with pytest.raises(TaskError, match="there is no such file or folder"):
        tasks.from_path(tmp_path / "missing", LETTERS)


def test_wikitext2_without_files_says_what_to_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SECATEUR_DATA", str(tmp_path))
    with pytest.raises(TaskError) as error:
        open_task("wikitext2", tokenizer=LETTERS)
    assert str(error.value) == (
        f"task 'wikitext2' was asked for, but wikitext2_raw_test.txt.gz is not in {tmp_path}.\n"
        "Set SECATEUR_DATA to a folder that holds wikitext2_raw_test.txt.gz, "
        "or allow the network with offline=False, or measure on python-docs."
    )
    monkeypatch.setenv("SECATEUR_DATA", str(tmp_path / "missing"))
    with pytest.raises(TaskError, match="there is no folder of data"):
        open_task("cifar10")


def test_wikitext2_comes_from_the_hub_only_when_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = []

    class Rows(list):
        def take(self, n: int) -> list:
            return self[:n]

        def __getitem__(self, key: object) -> object:
            return [row["text"] for row in self] if key == "text" else super().__getitem__(key)  # type: ignore[index]

    def load_dataset(name: str, *more: str, split: str, **_: object) -> Rows:
        asked.append((name, *more, split))
        return Rows({"text": f"{split} {i} of {name}\n"} for i in range(60))

    hub = ModuleType("datasets")
    hub.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", hub)
    monkeypatch.setenv("SECATEUR_DATA", str(tmp_path))
    task = open_task("wikitext2", tokenizer=LETTERS, offline="false", window=64)
    assert asked == [
        ("Salesforce/wikitext", "wikitext-2-raw-v1", "test"),
        ("Salesforce/wikitext", "wikitext-2-raw-v1", "validation"),
        ("allenai/c4", "train"),
    ]
    test = "\n\n".join(f"test {i} of Salesforce/wikitext\n" for i in range(60))
    assert task.ids["test"].tolist() == LETTERS.encode(test)  # type: ignore[union-attr]


@pytest.mark.data
def test_wikitext2_from_files(data: Path) -> None:
    task = open_task("wikitext2", tokenizer=LETTERS)
    other = open_task("wikitext2", tokenizer=LETTERS, calibration="wikitext2")
    text = gzip.decompress((data / "wikitext2_raw_test.txt.gz").read_bytes()).decode()
    assert task.ids["test"].tolist() == LETTERS.encode(text)  # type: ignore[union-attr]
    for split in ("val", "test", "train"):
        assert torch.equal(task.ids[split], other.ids[split])  # type: ignore[union-attr]
    valid = LETTERS.encode(gzip.decompress((data / "wikitext2_raw_valid.txt.gz").read_bytes()).decode())
    half = other.ids["calibration"].tolist()  # type: ignore[union-attr]
    assert half + task.ids["val"].tolist() == valid  # type: ignore[union-attr]
    assert len(half) == pytest.approx(len(valid) / 2, rel=0.01)
    assert len(task.ids["calibration"]) == pytest.approx(len(task.ids["train"]), rel=0.05)  # type: ignore[union-attr]
    with pytest.raises(TaskError, match="wikitext2 calibrated on 'c5' was asked for"):
        open_task("wikitext2", tokenizer=LETTERS, calibration="c5")


# Labelled examples and images


def test_calibration_examples_are_drawn_by_the_seed() -> None:
    task = tiny.toy_vectors()
    drawn = rows(task, "calibration", 40)
    assert torch.equal(drawn[:7], rows(tiny.toy_vectors(), "calibration", 7))
    assert not torch.equal(drawn, rows(tiny.toy_vectors(seed=1), "calibration", 40))
    assert len(rows(task, "calibration")) == task.samples


def test_accuracy_and_loss_of_a_case_worked_by_hand() -> None:
    inputs = torch.tensor([[0.0, math.log(3)], [math.log(3), 0.0], [0.0, math.log(3)]])
    task = Labelled("hand", {"val": (inputs, torch.tensor([1, 1, 1]))}, batch=2)
    found = task.measure(nn.Identity())
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert found["loss"] == pytest.approx(-(2 * math.log(3 / 4) + math.log(1 / 4)) / 3)
    assert found["examples"] == 3


def test_any_split_may_be_added_and_a_mismatch_is_an_error() -> None:
    x, y = torch.zeros(4, 2), torch.zeros(4)
    task = Labelled("own", {"train": (x, y), "forget": (x + 1, y), "calibration": (x + 2, y)})
    assert float(rows(task, "forget").mean()) == 1
    assert float(rows(task, "calibration").mean()) == 2
    with pytest.raises(TaskError, match="split 'val' of own was given 3 examples, but there are 4 labels"):
        Labelled("own", {"val": (x[:3], y)})
    with pytest.raises(TaskError, match="5 examples of own's 'train' split were asked for, but it holds 4"):
        list(task.batches("train", 5))
    empty = Labelled("own", {"val": (x[:0], y[:0])})
    with pytest.raises(TaskError, match="split 'val' of own was asked for, but it is empty"):
        empty.measure(nn.Identity())


def test_models_may_take_several_inputs() -> None:
    class Shifted(nn.Module):
        def forward(self, x: Tensor, shift: Tensor) -> dict[str, Tensor]:
            return {"logits": x + shift}

    x = torch.eye(2)
    task = Labelled("two", {"val": (x, 5 * x.flip(0), torch.tensor([1, 0]))})
    assert task.measure(Shifted())["accuracy"] == 1


def test_logits_are_found_in_every_usual_answer() -> None:
    x = torch.zeros(2)
    for answer in (x, (x, "state"), {"logits": x}, SimpleNamespace(logits=x)):
        assert logits_of(answer) is x
    with pytest.raises(TaskError, match="it is a SimpleNamespace without logits"):
        logits_of(SimpleNamespace(last_hidden_state=x))


def test_digits_are_learnt_within_seconds() -> None:
    task = open_task("digits", flat=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    fit(model, task, 150)
    found = task.measure(model, "test")
    assert found["accuracy"] > 0.9
    assert found["examples"] == 300


def test_digits_are_normalised_and_their_splits_are_disjoint() -> None:
    task = tasks.digits()
    images = rows(task, "train")
    assert images.shape == (1197, 1, 8, 8)
    assert float(images.mean()) == pytest.approx(0, abs=0.02)
    assert float(images.std()) == pytest.approx(1, abs=0.02)
    small = tasks.digits(train_size=20, val_size=10, test_size=5)
    assert [len(small.splits[s][-1]) for s in ("train", "val", "test")] == [20, 10, 5]
    assert torch.equal(small.splits["val"][0], task.splits["val"][0][-10:])
    with pytest.raises(TaskError, match=r"2,000 images of digits's 'train' split were asked for, but .* 1 to 1,197"):
        tasks.digits(train_size=2000)


def test_crop_and_flip_moves_each_image_whole() -> None:
    image = torch.arange(1, 10, dtype=torch.uint8).reshape(1, 1, 3, 3)
    many = crop_and_flip(image.expand(300, 2, 3, 3), 1, torch.Generator().manual_seed(0))
    wide = nn.functional.pad(image, (1, 1, 1, 1))[0, 0]
    crops = [wide[r : r + 3, c : c + 3] for r in range(3) for c in range(3)]
    allowed = [crop.flatten().tolist() for whole in crops for crop in (whole, whole.flip(1))]
    seen = many[:, 0].flatten(1).tolist()
    assert torch.equal(many[:, 0], many[:, 1])
    assert many.dtype == torch.uint8
    assert {tuple(s) for s in seen} == {tuple(a) for a in allowed}


def test_augmentation_is_for_training_only_and_follows_seed_and_epoch() -> None:
    task = tasks.digits(train_size=200, augment=2)
    assert torch.equal(rows(task, "train"), rows(task, "train"))
    still = replace(task, augment=0)
    assert not torch.equal(rows(task, "train"), rows(still, "train"))
    assert torch.equal(rows(task, "val"), rows(still, "val"))
    assert torch.equal(rows(task, "calibration"), rows(still, "calibration"))
    assert not torch.equal(rows(task, "train"), rows(task, "train", epoch=1))


def _models(data: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("data_pack_models", data / "models.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.data
def test_pretrained_resnet_reaches_its_accuracy_on_cifar10(data: Path) -> None:
    from safetensors.torch import load_file

    model = _models(data).ResNetCifar(20)
    model.load_state_dict(load_file(data / "weights" / "resnet20_cifar10_jpeg.safetensors"))
    task = open_task("cifar10", model=model, train_size=50, val_size=20, test_size=500)
    assert task.measure(model, "test")["accuracy"] == pytest.approx(0.8833, abs=0.04)
    assert [len(task.splits[s][-1]) for s in ("train", "val", "test")] == [50, 20, 500]  # type: ignore[union-attr]


@pytest.mark.data
def test_pretrained_vit_reaches_its_accuracy_on_fashion_mnist(data: Path) -> None:
    from transformers import ViTForImageClassification

    model = ViTForImageClassification.from_pretrained(data / "weights" / "vit_fashion")
    task = open_task("fashion-mnist", model=model, test_size=500)
    assert task.measure(model, "test")["accuracy"] == pytest.approx(0.819, abs=0.05)
    assert len(task.splits["train"][-1]) == 55_000  # type: ignore[union-attr]
    with pytest.raises(TaskError, match=r"its images are \[1, 8, 8\] and the model takes \[1, 28, 28\]"):
        open_task("digits", model=model)


@pytest.mark.data
def test_pretrained_gru_reaches_its_accuracy_on_spoken_digits(data: Path) -> None:
    from safetensors.torch import load_file

    model = _models(data).SpokenDigitGRU()
    model.load_state_dict(load_file(data / "weights" / "fsdd_gru.safetensors"))
    task = open_task("spoken-digits")
    assert task.measure(model, "test")["accuracy"] == pytest.approx(0.9933, abs=1e-3)


@pytest.mark.data
def test_pretrained_character_model_reaches_its_likelihood_on_tinyshakespeare(data: Path) -> None:
    from safetensors.torch import load_file

    model = _models(data).CharLSTM()
    model.load_state_dict(load_file(data / "weights" / "char_lstm.safetensors"))
    task = open_task("tinyshakespeare", batch=32, windows=100)
    assert task.measure(model, "test")["nll"] == pytest.approx(1.5195, abs=0.15)


# Opening by name


def test_every_task_has_a_name_and_an_unknown_one_gets_advice() -> None:
    assert tasks.names() == sorted(tasks.names())
    assert {"python-docs", "wikitext2", "digits", "cifar10", "fashion-mnist"} <= set(tasks.names())
    with pytest.raises(TaskError, match=r"task 'cifar' was asked for(.|\n)*Did you mean cifar10\?(.|\n)*or folder"):
        open_task("cifar")
    with pytest.raises(TaskError, match="there is none of that name"):
        open_task("")


def test_settings_may_come_as_text_and_unknown_ones_get_advice() -> None:
    task = open_task("digits", batch="16", train_size="50", flat="true", learning_rate="0.5", seed=3)
    assert (task.batch, task.seed, task.flat) == (16, 3, True)  # type: ignore[union-attr]
    assert task.optimizer([nn.Parameter(torch.zeros(1))]).param_groups[0]["lr"] == 0.5
    assert open_task("python-docs", tokenizer=LETTERS, windows="none").windows is None  # type: ignore[union-attr]
    with pytest.raises(SettingError, match=r"setting 'windw' of task 'python-docs' was given(.|\n)*mean window"):
        open_task("python-docs", tokenizer=LETTERS, windw=3)
    with pytest.raises(SettingError, match="setting 'window' of task 'digits' was given"):
        open_task("digits", window=3)
    with pytest.raises(SettingError, match="batch 'many' of task 'digits' was given, but it is not a number"):
        open_task("digits", batch="many")


def test_text_for_a_vision_model_and_images_for_a_language_model_are_errors() -> None:
    for model in (tiny.cnn(), tiny.vision_transformer()):
        with pytest.raises(TaskError, match=f"but {type(model).__name__} takes images(.|\n)*digits"):
            open_task("python-docs", model=model)
    for model in (tiny.decoder(), tiny.encoder()):
        with pytest.raises(TaskError, match=f"but {type(model).__name__} takes token ids(.|\n)*python-docs"):
            open_task("digits", model=model)
    assert open_task("digits", model=tiny.mlp(), flat=True).name == "digits"


def test_the_window_is_cut_to_the_model_and_tokens_are_checked_against_it() -> None:
    small = Characters([chr(i) for i in range(97, 123)] + [" ", "\n"])
    task = open_task("python-docs", tokenizer=small, model=tiny.decoder())
    assert task.window == 128  # type: ignore[union-attr]
    assert task.example.inputs[0].shape == (1, 128)  # type: ignore[index]
    assert replace(task, window=256).example.inputs[0].shape == (1, 128)  # type: ignore[type-var, attr-defined]
    assert replace(task, window=16).example.inputs[0].shape == (1, 16)  # type: ignore[type-var, attr-defined]
    with pytest.raises(TaskError, match="the tokenizer gives token 95 and the model knows 64 tokens"):
        open_task("python-docs", tokenizer=LETTERS, model=tiny.decoder())


@pytest.mark.parametrize("learner", [Sgd(0.3), Adam(0.3), AdamW(0.3)])
def test_learners_make_fresh_optimizers(learner: Sgd | Adam | AdamW) -> None:
    weight = nn.Parameter(torch.ones(1))
    first, second = learner([weight]), learner([weight])
    assert first is not second
    assert first.param_groups[0]["lr"] == 0.3
    assert repr(learner).startswith(type(learner).__name__)


@pytest.mark.model
def test_a_pretrained_language_model_reaches_its_perplexity(smollm2: SimpleNamespace) -> None:
    task = open_task("python-docs", tokenizer=smollm2.tokenizer, model=smollm2.model, window=128, windows=2)
    assert 5 < task.measure(smollm2.model, "test")["perplexity"] < 60


# Divided tasks


def numbered(examples: int = 400, classes: int = 4, **changes: object) -> Labelled:
    """Examples that are their own numbers."""
    x = torch.arange(examples).float().unsqueeze(1)
    return Labelled("numbered", {"train": (x, torch.arange(examples) % classes)}, **changes)  # type: ignore[arg-type]


def test_clients_share_all_training_examples_and_none_twice() -> None:
    task = tasks.federated(numbered(), 5)
    owned = torch.cat([client.splits["train"][0] for client in task.clients])  # type: ignore[attr-defined]
    assert sorted(owned.flatten().tolist()) == list(range(400))
    assert all(isinstance(client, Task) for client in task.clients)
    again, other = tasks.federated(numbered(), 5), tasks.federated(numbered(seed=1), 5)
    assert task.fingerprint() == again.fingerprint()
    assert [len(c.splits["train"][1]) for c in task.clients] != [len(c.splits["train"][1]) for c in other.clients]  # type: ignore[attr-defined]
    assert len({client.seed for client in task.clients}) == 5


def test_a_lower_concentration_gives_clients_fewer_classes() -> None:
    def largest(concentration: float) -> float:
        task = tasks.federated(numbered(2000), 5, concentration=concentration)
        counts = [torch.bincount(c.splits["train"][1], minlength=4).float() for c in task.clients]  # type: ignore[attr-defined]
        return float(sum(count.max() / count.sum() for count in counts)) / 5

    assert largest(math.inf) == pytest.approx(0.25)
    assert largest(0.1) > 0.5 > largest(100) > 0.25


def test_too_many_clients_are_an_error() -> None:
    with pytest.raises(TaskError, match="there are 400 examples to divide"):
        tasks.federated(numbered(), 201)
    with pytest.raises(TaskError, match=r"none of 100 divisions with concentration 0\.001 has them"):
        tasks.federated(numbered(), 50, concentration=0.001)


def test_what_to_forget_and_what_to_retain_are_disjoint() -> None:
    task = tasks.forgetting(numbered(), share=0.25)
    forget, retain = (task.splits[s][0].flatten().tolist() for s in ("forget", "retain"))
    assert len(forget) == 100
    assert sorted(forget + retain) == list(range(400))
    assert forget != tasks.forgetting(numbered(seed=1), share=0.25).splits["forget"][0].flatten().tolist()
    by_class = tasks.forgetting(numbered(), label=2)
    assert by_class.splits["forget"][1].unique().tolist() == [2]
    assert by_class.splits["retain"][1].unique().tolist() == [0, 1, 3]
    with pytest.raises(TaskError, match="class 9 of numbered was to be forgotten, but that is 0 of 400"):
        tasks.forgetting(numbered(), label=9)
