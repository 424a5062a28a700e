"""Multiple-choice questions a model was never trained for, asked by the lm-eval harness, with no network.

Questions come from the data pack or from a file of one's own; prompts, likelihoods and accuracies are the harness's
(Gao et al., "A framework for few-shot language model evaluation", doi 10.5281/zenodo.12608602), so that a number here
is what its users expect of one. An answer is the choice of the highest log-likelihood (acc), or of the highest per
byte (acc_norm).
"""

import gzip
import io
import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from secateur.errors import ModelError, TaskError, did_you_mean
from secateur.task import modes_of, restore_modes_
from secateur.tasks import pack

PACKED = "multiple_choice.jsonl.gz"
INSTALL = "Install it: pip install 'secateur[eval]'."

Question = dict[str, Any]  # {"question": str, "choices": list[str], "gold": int}


@dataclass(frozen=True)
class Prompt:
    """How the harness puts a question, and which of its accuracies its own task reports."""

    text: Callable[[Question], str | int]
    choices: Callable[[Question], list[str]]
    target: Callable[[Question], str | int]
    metrics: tuple[str, ...]


def _asked(before: str, after: str, *metrics: str) -> Prompt:
    return Prompt(
        lambda q: f"{before}{q['question']}{after}", lambda q: list(q["choices"]), lambda q: int(q["gold"]), metrics
    )


def _yes_or_no(q: Question) -> list[str]:
    """The harness answers no and yes where the file has false and true."""
    return [{"false": "no", "true": "yes"}.get(choice, choice) for choice in q["choices"]]


def _filled(q: Question) -> list[str]:
    """The sentence up to the blank, with each choice in it."""
    head = q["question"].split("_", 1)[0]
    return [head + choice for choice in q["choices"]]


# As the harness's tasks of these names ask; winogrande compares how likely the rest of the sentence is after each.
PROMPTS: Mapping[str, Prompt] = {
    "arc_challenge": _asked("Question: ", "\nAnswer:", "acc", "acc_norm"),
    "arc_easy": _asked("Question: ", "\nAnswer:", "acc", "acc_norm"),
    # The harness shows the passage first; this data has none, so that it is another and harder task.
    "boolq_no_passage": replace(_asked("Question: ", "\nAnswer:", "acc"), choices=_yes_or_no),
    "openbookqa": _asked("", "", "acc", "acc_norm"),
    "piqa": _asked("Question: ", "\nAnswer:", "acc", "acc_norm"),
    "social_iqa": _asked("Q: ", "\nA:", "acc"),
    "winogrande": Prompt(
        lambda q: int(q["gold"]), _filled, lambda q: str(q["question"].split("_", 1)[1].strip()), ("acc",)
    ),
}
IN_THE_PACK = {"boolq_no_passage": "boolq", "social_iqa": "social_i_qa"}  # what the file calls them
OWN = _asked("Question: ", "\nAnswer:", "acc", "acc_norm")  # for a file of one's own


def names() -> list[str]:
    """Every set of questions by name, sorted."""
    return sorted(PROMPTS)


def questions(name: str) -> list[Question]:
    """The questions of a name, or of a file of one's own (.jsonl or .jsonl.gz).

    A line is {"question": ..., "choices": [...], "gold": place of the right one}. Raises TaskError, with the nearest
    name, for one that does not exist, and for a line that is no question.
    """
    if name in PROMPTS:
        path, kind = pack.file(PACKED, name), IN_THE_PACK.get(name, name)
    elif ".jsonl" in Path(name).suffixes and Path(name).is_file():
        path, kind = Path(name), ""
    else:
        raise TaskError(
            f"zero-shot task {name!r} was asked for",
            "there is none of that name, nor a .jsonl file",
            did_you_mean(name, names()),
        )
    raw = path.read_bytes()
    lines = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8").splitlines()
    found = [
        question
        for number, line in enumerate(lines, 1)
        if line.strip() and (question := _question(line, number, name, kind)) is not None
    ]
    if not found:
        raise TaskError(f"zero-shot task {name!r} was asked for", f"{path} has no question of it", "Give another file.")
    return found


def _question(line: str, number: int, name: str, kind: str) -> Question | None:
    try:
        row = json.loads(line)
        if kind and row["task"] != kind:
            return None
        found = {"question": str(row["question"]), "choices": [str(c) for c in row["choices"]], "gold": row["gold"]}
    except (ValueError, KeyError, TypeError) as reason:
        problem = f"line {number} is no question ({reason!r})"
    else:
        gold, choices = found["gold"], found["choices"]
        if isinstance(gold, int) and 0 <= gold < len(choices) and all(choices) and len(choices) > 1:
            return found
        problem = f"line {number} has {len(choices)} choices, and the right one is {gold!r}"
    raise TaskError(
        f"zero-shot task {name!r} was asked for",
        problem,
        'Give lines like {"question": "...", "choices": ["...", "..."], "gold": 0}.',
    )


def check(names: Sequence[str], tokenizer: Any) -> None:
    """Raise TaskError for a name or a file that cannot be asked, ModelError where harness or tokenizer are missing."""
    for name in names:
        questions(name)
    asked = f"zero-shot {', '.join(names)} was asked for"
    if names and not _harness_is_there():
        raise ModelError(asked, "the lm-eval harness is not installed", INSTALL)
    if names and (tokenizer is None or not hasattr(tokenizer, "eos_token_id")):
        raise ModelError(asked, "the model came without a tokenizer of transformers", "Give a language model with one.")


def _harness_is_there() -> bool:
    from importlib.util import find_spec

    return find_spec("lm_eval") is not None


def zero_shot(
    model: nn.Module, tokenizer: Any, names: Sequence[str], limit: int | None = None, batch: int = 8
) -> dict[str, dict[str, float]]:
    """What a model answers: task -> {"acc", "acc_stderr", ("acc_norm", "acc_norm_stderr",) "questions", "choices"}.

    Accuracies in [0, 1] with the standard error of the mean over the first `limit` questions of each; "chance" is
    the accuracy of guessing. Raises as `check` does.
    """
    check(names, tokenizer)
    if not names:
        return {}
    asked = {Path(name).name.split(".")[0]: (PROMPTS.get(name, OWN), questions(name)[:limit]) for name in names}
    with quiet(), as_it_is(model):
        from lm_eval.evaluator import evaluate

        scorer = _scorer(model, tokenizer, batch)
        tasks = {name: _task(name, prompt, rows) for name, (prompt, rows) in asked.items()}
        # simple_evaluate would seed torch, numpy and random for everybody, and read every task it ships with.
        found = evaluate(
            scorer, {"tasks": tasks, "groups": {}, "group_map": {}}, log_samples=False, bootstrap_iters=100
        )
    if found is None:
        return {}  # another process of several gathers the results
    return {name: _values(found["results"][name], prompt, rows) for name, (prompt, rows) in asked.items()}


def _values(found: Mapping[str, Any], prompt: Prompt, rows: Sequence[Question]) -> dict[str, float]:
    values: dict[str, float] = {}
    for metric in prompt.metrics:
        values[metric] = float(found[f"{metric},none"])
        error = found.get(f"{metric}_stderr,none")
        # One question has no spread, and the harness then says "N/A".
        values[f"{metric}_stderr"] = float(error) if isinstance(error, (int, float)) else math.nan
    values["questions"] = float(len(rows))
    values["chance"] = sum(1 / len(row["choices"]) for row in rows) / len(rows)
    return values


def _task(name: str, prompt: Prompt, rows: Sequence[Question]) -> Any:
    """A task of the harness over rows that are here already."""
    import datasets
    from lm_eval.api.task import ConfigurableTask

    config = {
        "task": name,
        "custom_dataset": lambda: {"test": datasets.Dataset.from_list(list(rows))},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": prompt.text,
        "doc_to_choice": prompt.choices,
        "doc_to_target": prompt.target,
        "num_fewshot": 0,
        "metric_list": [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in prompt.metrics],
    }
    task = ConfigurableTask(config=config)
    task.set_fewshot_seed(seed=0)
    return task


def _scorer(model: nn.Module, tokenizer: Any, batch: int) -> Any:
    """The harness's own scorer of causal language models, around a model in memory."""
    import copy

    from lm_eval.models.huggingface import HFLM

    # A copy of the tokenizer: the harness gives it a padding token.
    return HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), backend="causal", batch_size=batch)


@contextmanager
def as_it_is(model: nn.Module) -> Iterator[None]:
    """A model whose weights stay: the harness ties the head to the embedding anew wherever the config says so.

    After a cut the two may differ, and would be overwritten. Evaluation mode, which it sets, is undone as well.
    """
    modes = modes_of(model)
    vars(model)["tie_weights"] = lambda *_, **__: None
    try:
        yield
    finally:
        del vars(model)["tie_weights"]
        restore_modes_(model, modes)


@contextmanager
def quiet() -> Iterator[None]:
    """Without what the harness logs about every task, and without its bars."""
    log = logging.getLogger("lm_eval")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        log.setLevel(level)
