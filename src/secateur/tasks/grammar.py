"""Strings of the Reber grammar, and strings that are nearly of it: what recurrent networks are tried on.

Reber. "Implicit learning of artificial grammars." 1967. A walk through a small automaton spells a string; whether a
string is such a walk is a matter of its order, so that a network has to keep in mind where the walk has got to.
"""

from typing import Any

import torch
from torch import Tensor

from secateur.errors import TaskError
from secateur.tasks.labelled import Labelled
from secateur.tasks.learners import Adam

NEXT: dict[int, tuple[tuple[str, int], ...]] = {
    0: (("B", 1),),
    1: (("T", 2), ("P", 3)),
    2: (("S", 2), ("X", 4)),
    3: (("T", 3), ("V", 5)),
    4: (("X", 3), ("S", 6)),
    5: (("P", 4), ("V", 6)),
    6: (("E", 7),),
}
"""What may be written in each state, and where it leads; 7 is the end."""

END = 7
LETTERS = "BEPSTVX"
VOCABULARY = 128  # a letter's token is its ASCII code; 0 stands behind the end


def accepts(string: str) -> bool:
    """Whether a string is of the grammar.

    >>> accepts("BTXSE"), accepts("BTXTE")
    (True, False)
    """
    state = 0
    for letter in string:
        state = dict(NEXT.get(state, ())).get(letter, -1)
    return state == END


def reber(
    *,
    train_size: int = 18_750,
    val_size: int = 2_000,
    test_size: int = 6_250,
    shortest: int = 11,
    longest: int = 53,
    seed: int = 0,
    **settings: Any,
) -> Labelled:
    """Strings that are of the Reber grammar (class 1) or not (class 0), half of each: int64 [N, longest], zero-padded.

    Half of the others have one letter replaced by another letter of the grammar, half have random letters of the
    alphabet in a third of their places. The split "hard" has the first kind only: letters from outside the grammar
    give the second kind away. The strings of all splits are different, and the same whatever the seed, which draws the
    order of training. `settings` are fields of `Labelled`.

    Darji 2021, arXiv 2407.20601, section 4.1: 25,000 strings of 11 to 53 letters. Raises TaskError for sizes below one
    and for lengths that the grammar has too few strings of.
    """
    sizes = {"train": train_size, "val": val_size, "test": test_size, "hard": test_size}
    if min(sizes.values()) < 2 or not 5 <= shortest <= longest:
        raise TaskError(
            f"{sizes} strings of {shortest} to {longest} letters were asked for",
            "every split needs two at least, and the shortest string of the grammar has five letters",
            "Give larger sizes, or another range of lengths.",
        )
    draw, seen = torch.Generator().manual_seed(0), set[str]()
    splits: dict[str, tuple[Tensor, ...]] = {}
    for split, size in sizes.items():
        strings: list[str] = []
        for i in range(size):
            valid = i % 2 == 1
            easy = not valid and split != "hard" and i % 4 == 0
            strings.append(_fresh(valid, easy, shortest, longest, seen, draw))
        ids = torch.zeros(size, longest, dtype=torch.int64)
        for row, string in enumerate(strings):
            ids[row, : len(string)] = torch.tensor([ord(letter) for letter in string])
        splits[split] = (ids, torch.arange(size) % 2)
    return Labelled("reber", splits, seed=seed, **{"batch": 32, "learner": Adam(), **settings})


def _fresh(valid: bool, easy: bool, shortest: int, longest: int, seen: set[str], draw: torch.Generator) -> str:
    """A string that was not seen before, of one of the three kinds."""
    for _ in range(20_000):
        string = _walk(shortest, longest, draw)
        if not valid:
            string = _scattered(string, draw) if easy else _changed(string, draw)
        if string not in seen and accepts(string) == valid:
            seen.add(string)
            return string
    raise TaskError(
        f"more strings of {shortest} to {longest} letters were asked for",
        f"after {len(seen):,} no other was found",
        "Give a wider range of lengths, or ask for fewer.",
    )


def _walk(shortest: int, longest: int, draw: torch.Generator) -> str:
    while True:
        state, string = 0, ""
        coins = torch.randint(2, (longest + 1,), generator=draw).tolist()
        while state != END and len(string) <= longest:
            ways = NEXT[state]
            letter, state = ways[coins[len(string)] % len(ways)]
            string += letter
        if state == END and shortest <= len(string) <= longest:
            return string


def _changed(string: str, draw: torch.Generator) -> str:
    """One letter between the first and the last replaced by another letter of the grammar."""
    place = int(torch.randint(1, len(string) - 1, (), generator=draw))
    others = [letter for letter in LETTERS if letter != string[place]]
    return string[:place] + others[int(torch.randint(len(others), (), generator=draw))] + string[place + 1 :]


def _scattered(string: str, draw: torch.Generator) -> str:
    """A third of the letters replaced by any of A to Z."""
    letters = list(string)
    for place in torch.randperm(len(letters), generator=draw)[: max(1, len(letters) // 3)].tolist():
        letters[place] = chr(ord("A") + int(torch.randint(26, (), generator=draw)))
    return "".join(letters)
