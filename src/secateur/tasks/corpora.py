"""Texts cut into disjoint parts and turned into token ids: yours, Python's own documentation, WikiText-2, ..."""

import gzip
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from secateur.errors import TaskError
from secateur.tasks import pack
from secateur.tasks.text import Text

SHARES = {"train": 0.4, "calibration": 0.3, "val": 0.1, "test": 0.2}
"""What part of the characters of a text goes to each split."""

SUFFIXES = (".txt", ".md", ".rst", ".py", ".jsonl", ".txt.gz", ".jsonl.gz")
"""Files that are read out of a folder; a line of .jsonl is {"text": ...}."""

C4_DOCUMENTS = 2000  # taken from the first shard of C4 when it is downloaded: about a million tokens


class Tokenizer(Protocol):
    """Turns text into token ids."""

    def encode(self, text: str) -> Any:
        """Token ids as a list, or as something with `ids`."""
        ...


class Characters:
    """One token per character: its place in a vocabulary. Characters that are not in it are left out."""

    def __init__(self, vocabulary: Sequence[str]) -> None:
        self.vocabulary = {character: i for i, character in enumerate(vocabulary)}

    def encode(self, text: str) -> list[int]:
        """Token ids."""
        return [self.vocabulary[c] for c in text if c in self.vocabulary]


class Bytes:
    """One token per byte of UTF-8, 256 in all: what reads any text without a vocabulary of its own."""

    def encode(self, text: str) -> list[int]:
        """Token ids."""
        return list(text.encode("utf-8"))

    def decode(self, ids: Sequence[int]) -> str:
        """The text again; a character that was cut in two is shown as such."""
        return bytes(ids).decode("utf-8", errors="replace")


def from_text(
    text: str | Sequence[str], tokenizer: Tokenizer | None, *, name: str = "text", window: int = 512, **settings: Any
) -> Text:
    """A task over a text, or over documents, cut by length into train, calibration, val and test in that order.

    Documents stay whole unless they are longer than a twentieth of all; those are cut at paragraphs or lines.
    `settings` are fields of `Text`. Raises TaskError for a text that is empty, or whose splits do not all have the
    tokens for one window.
    """
    return _task(name, _divide(_documents(text), SHARES), tokenizer, window=window, **settings)


def from_path(path: str | Path, tokenizer: Tokenizer | None, **settings: Any) -> Text:
    """A task over a text file, or over all text files of a folder (.txt, .md, .rst, .py, .jsonl; .gz as well)."""
    place = Path(path)
    if not place.exists():
        raise TaskError(f"text in {str(place)!r} was asked for", "there is no such file or folder", "Check the path.")
    files = sorted(p for p in place.rglob("*") if p.name.endswith(SUFFIXES)) if place.is_dir() else [place]
    if not files:
        raise TaskError(
            f"text in {str(place)!r} was asked for", "the folder has no text files", f"Add some: {', '.join(SUFFIXES)}."
        )
    documents = [document for file in files for document in read(file)]
    return from_text(documents, tokenizer, **{"name": place.name.split(".")[0], **settings})


def python_docs(tokenizer: Tokenizer | None, *, window: int = 512, **settings: Any) -> Text:
    """The documentation that comes with Python (about 80 topics, 0.5 M characters): real English without a download.

    A topic belongs to one split only; which one is drawn from its name. The text is that of the running Python, so
    numbers of two Python versions are not comparable: the fingerprint tells them apart.
    """
    from pydoc_data.topics import topics

    def shuffled(name: str) -> str:
        return hashlib.sha256(name.encode()).hexdigest()

    return _task(
        "python-docs",
        _divide([topics[name] + "\n\n" for name in sorted(topics, key=shuffled)], SHARES),
        tokenizer,
        window=window,
        **settings,
    )


def wikitext2(
    tokenizer: Tokenizer | None,
    *,
    calibration: Literal["c4", "wikitext2"] = "c4",
    offline: bool = True,
    window: int = 2048,
    **settings: Any,
) -> Text:
    """WikiText-2 raw as pruning papers measure it: rows joined by two newlines, in windows that do not overlap.

    "test" is the whole test split and "val" the second half of the validation split. "calibration" and "train" are
    halves of a sample of C4; with calibration "wikitext2" the first half of the validation split calibrates instead.
    Files come from the folder SECATEUR_DATA names, or with `offline` False from the Hugging Face hub. Raises
    TaskError when they can be had from neither.

    Source: Merity et al. 2016, arXiv 1609.07843; the protocol is that of Frantar and Alistarh 2023, arXiv 2301.00774.
    """
    if calibration not in ("c4", "wikitext2"):
        raise TaskError(
            f"wikitext2 calibrated on {calibration!r} was asked for",
            "it is calibrated on c4 or on wikitext2",
            'Give calibration "c4" or "wikitext2".',
        )
    test, valid, c4 = _wikitext2_files() if _at_hand() or offline else _wikitext2_hub()
    half = _divide(_documents(valid), {"calibration": 0.5, "val": 0.5})
    crawl = _divide(_documents(c4), {"calibration": 0.5, "train": 0.5})
    own = half["calibration"] if calibration == "wikitext2" else crawl["calibration"]
    texts = {"calibration": own, "train": crawl["train"], "val": half["val"], "test": test}
    return _task("wikitext2", texts, tokenizer, window=window, **settings)


def tinyshakespeare(tokenizer: Tokenizer | None = None, *, window: int = 128, **settings: Any) -> Text:
    """Tiny Shakespeare, 1.1 M characters; by characters unless there is a tokenizer. "test" is the last tenth."""
    path = pack.file("tinyshakespeare.txt.gz", "tinyshakespeare")
    text = "".join(read(path))
    if tokenizer is None:
        tokenizer = Characters(sorted(set(text)))
    cuts = [0, int(0.65 * len(text)), int(0.85 * len(text)), int(0.9 * len(text)), len(text)]
    texts = {s: text[cuts[i] : cuts[i + 1]] for i, s in enumerate(("train", "calibration", "val", "test"))}
    return _task("tinyshakespeare", texts, tokenizer, window=window, **settings)


def c4(tokenizer: Tokenizer | None, **settings: Any) -> Text:
    """A sample of C4, 2,000 documents (Raffel et al. 2019, arXiv 1910.10683)."""
    return from_path(pack.file("c4_sample.jsonl.gz", "c4"), tokenizer, **{"name": "c4", **settings})


def stackexchange(tokenizer: Tokenizer | None, **settings: Any) -> Text:
    """A sample of StackExchange, 1,000 questions with answers: another domain than the web at large."""
    path = pack.file("stackexchange_sample.jsonl.gz", "stackexchange")
    return from_path(path, tokenizer, **{"name": "stackexchange", **settings})


def read(path: Path) -> list[str]:
    """The documents of a text file: one, or one a line in .jsonl, with `text` in each."""
    try:
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8")
        if ".jsonl" not in path.suffixes:
            return [text]
        return [str(json.loads(line)["text"]) for line in text.splitlines() if line.strip()]
    except UnicodeDecodeError:
        raise TaskError(f"text in {str(path)!r} was asked for", "it is not UTF-8", "Convert it first.") from None
    except (json.JSONDecodeError, KeyError, TypeError) as reason:
        raise TaskError(
            f"documents in {str(path)!r} were asked for",
            f"a line of it is not JSON with a text ({reason})",
            'Give a line like {"text": "..."} per document.',
        ) from None


def _documents(text: str | Sequence[str]) -> list[str]:
    """Documents, those longer than a twentieth of all cut at paragraphs, else lines, else sentences, else anywhere.

    Joined, the pieces are the text again, with an empty line between documents.
    """
    given = [text] if isinstance(text, str) else [*(f"{document}\n\n" for document in text[:-1]), *text[-1:]]
    most = max(sum(map(len, given)) // 20, 1)
    for boundary in (r"(?<=\n\n)", r"(?<=\n)", r"(?<=[.!?] )", r"(?<= )"):
        given = [piece for d in given for piece in (re.split(boundary, d) if len(d) > most else [d]) if piece]
    return [d[i : i + most] for d in given for i in range(0, len(d), most)]


def _divide(documents: Sequence[str], shares: Mapping[str, float]) -> dict[str, str]:
    """Documents in order, each wholly in the split in whose share of the characters its middle lies."""
    total = max(sum(map(len, documents)), 1)
    bounds, edge = [], 0.0
    for split, share in shares.items():
        edge += share
        bounds.append((edge, split))
    held: dict[str, list[str]] = {split: [] for split in shares}
    place = 0
    for document in documents:
        middle = (place + len(document) / 2) / total
        held[next((split for bound, split in bounds if middle < bound), bounds[-1][1])].append(document)
        place += len(document)
    return {split: "".join(some) for split, some in held.items()}


def _task(name: str, texts: Mapping[str, str], tokenizer: Tokenizer | None, **settings: Any) -> Text:
    if not any(text.strip() for text in texts.values()):
        raise TaskError(f"task {name!r} was asked for", "its text is empty", "Give a text that has words in it.")
    if tokenizer is None:
        raise TaskError(
            f"task {name!r} was asked for",
            "there is no tokenizer to turn its text into token ids",
            "Give the model's tokenizer, or for a model that is not a language model an image task such as digits.",
        )
    task = Text(name, {split: _encode(tokenizer, text) for split, text in texts.items()}, **settings)
    for split, stream in task.ids.items():
        if len(stream) < task.window:
            raise TaskError(
                f"task {name!r} in windows of {task.window:,} tokens was asked for",
                f"its {split!r} split has {len(stream):,} tokens of the {sum(map(len, task.ids.values())):,} in all",
                "Give a longer text, or a shorter window.",
            )
    return task


def _encode(tokenizer: Tokenizer, text: str) -> Tensor:
    found = tokenizer.encode(text)
    return torch.tensor(list(getattr(found, "ids", found)), dtype=torch.int64)


WIKITEXT2 = ("wikitext2_raw_test.txt.gz", "wikitext2_raw_valid.txt.gz", "c4_sample.jsonl.gz")


def _at_hand() -> bool:
    place = pack.folder()
    return place is not None and all((place / name).is_file() for name in WIKITEXT2)


def _wikitext2_files() -> tuple[str, str, list[str]]:
    try:
        test, valid, c4 = (pack.file(name, "wikitext2") for name in WIKITEXT2)
    except TaskError as missing:
        do = f"{missing.do[:-1]}, or allow the network with offline=False, or measure on python-docs."
        raise TaskError(missing.asked, missing.found, do) from None
    return read(test)[0], read(valid)[0], read(c4)


def _wikitext2_hub() -> tuple[str, str, list[str]]:
    asked = "task 'wikitext2' from the Hugging Face hub was asked for"
    try:
        from datasets import load_dataset
    except ImportError:
        raise TaskError(asked, "the datasets library is not installed", "pip install 'secateur[hf]'") from None
    try:
        rows = {
            split: "\n\n".join(load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split=split)["text"])
            for split in ("test", "validation")
        }
        shard = {"train": "en/c4-train.00000-of-01024.json.gz"}
        stream = load_dataset("allenai/c4", data_files=shard, split="train", streaming=True)
        documents = [str(row["text"]) for row in stream.take(C4_DOCUMENTS)]
    except (OSError, ValueError) as reason:
        raise TaskError(
            asked, f"it could not be had ({reason})", "Check the connection, or set SECATEUR_DATA to a folder with it."
        ) from reason
    return rows["test"], rows["validation"], documents
