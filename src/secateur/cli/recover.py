"""`secateur recover`: train a saved, pruned model back towards what it was, its zeros where they are."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from secateur.cli import prune
from secateur.cli.options import SETTINGS, Verb, measuring, running, spoken

if TYPE_CHECKING:
    from torch import nn

    from secateur.method import Method


@click.command("recover", cls=Verb)
@click.argument("model", metavar="DIR")
@click.argument("method")
@click.option("--out", required=True, metavar="DIR", help="Where the recovered model is saved.")
@click.option("--dense", metavar="MODEL", help="The model before it was pruned. [default: what DIR says it came from]")
@click.option("--overwrite", is_flag=True, help="Replace a model that secateur saved there before.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change a setting of a recipe.")
@click.option(
    "--resume", metavar="DIR", help="Where finished blocks are kept until the end. [default: hidden, beside DIR]"
)
@click.option("--fresh", is_flag=True, help="Forget what an earlier, unfinished run left there.")
@click.option("--no-eval", is_flag=True, help="Do not measure quality before and after.")
@click.option("--timing", is_flag=True, help="Time a forward pass of both models, in turn.")
@measuring
@running
@spoken
@click.pass_context
def command(ctx: click.Context, /, model: str, method: str, out: str, dense: str | None, **given: Any) -> int:
    """Recover a pruned model and save it anew: nothing is added, and what was zero is zero.

    DIR is a folder that `secateur prune` wrote; its edits say which weights are masked. METHOD is one that recovers,
    such as perp; `secateur recover DIR METHOD --help` lists its settings. Ends with 2 for bad input.
    """
    from secateur.axes.recovery import beside
    from secateur.cli.opening import recipe_from
    from secateur.models import load_edits

    refuse_processes()
    refuse_unpruned(model)
    recipe = recipe_from(method, ctx.meta[SETTINGS], given["overrides"])
    refuse_pruner(recipe.method)
    wanted = dense if dense is not None else source_of(model) if needs_dense(recipe.method) else None
    edits = load_edits(model)
    run = prune.command.callback
    assert run is not None, "prune is a command"
    before = open_dense(wanted, given["dtype"], given["device"], given["online"]) if wanted else None
    with beside(dense=before, edits=edits):
        # Called, not invoked: the run is recorded under the command that was typed.
        code = run(model=model, method=method, out=out, **given)
    check_zeros(Path(model), Path(out))
    return int(code or 0)


def refuse_processes() -> None:
    """Raise SettingError under torchrun: training is not divided, so that further processes would do it all again."""
    from secateur.distributed import together
    from secateur.errors import SettingError

    with together() as ours:
        if not ours.alone:
            raise SettingError(
                f"a model was to be recovered in {ours.count} processes",
                "only calibration is divided",
                "Start without torchrun.",
            )


def refuse_unpruned(folder: str) -> None:
    """Raise ModelError unless a folder holds a model that secateur pruned."""
    from secateur.errors import ModelError
    from secateur.models.folder import is_ours

    if not Path(folder).is_dir() or not is_ours(Path(folder)):
        raise ModelError(
            f"{folder} was to be recovered",
            "it is no folder that secateur saved" if Path(folder).exists() else "there is no such folder",
            "Prune a model first: secateur prune MODEL METHOD --out DIR.",
        )


def refuse_pruner(method: "Method") -> None:
    """Raise SettingError for a method that removes something."""
    from secateur.errors import SettingError
    from secateur.method import load, names
    from secateur.plan import links

    for link in links(method):
        before = getattr(link, "after", None)
        if link.card.when != "recovery" or before is not None:
            known = ", ".join(name for name in names() if load(name).card.when == "recovery")
            raise SettingError(
                f"a model was to be recovered by {link.name}",
                "it prunes" if before is None else f"it prunes first, by {before.name}",
                f"Use secateur prune for it. Those that recover: {known}.",
            )


def needs_dense(method: "Method") -> bool:
    """Whether any part of a method compares with the model before it was pruned."""
    from secateur.plan import links

    return any(bool(getattr(link, "needs_dense", False)) for link in links(method))


def source_of(folder: str) -> str:
    """What a saved model was made from. Raises ModelError where that is not known or not there."""
    from secateur.errors import ModelError
    from secateur.models import NAMES
    from secateur.models.folder import RECORD, is_ours, read_json

    saved = read_json(Path(folder) / RECORD)
    about = saved.get("saved", {})
    source = about.get("source")
    asked = f"{folder} was to be compared with the model it was made from"
    if about.get("opened") == "secateur" or (
        isinstance(source, str) and Path(source).is_dir() and is_ours(Path(source))
    ):
        raise ModelError(asked, f"that is {source}, which was pruned itself", "Name the dense model: --dense MODEL.")
    name = saved.get("model", {}).get("name")
    found = name if name in NAMES else source
    if not isinstance(found, str) or not found:
        raise ModelError(asked, "it does not say which that is", "Name the dense model: --dense MODEL.")
    return found


def open_dense(what: str, dtype: str | None, device: str | None, online: bool) -> "nn.Module":
    """The model before it was pruned, in the precision and place of the other."""
    from secateur.cli.opening import model_from

    return model_from(what, dtype=dtype or "float32", device=device, online=online).model


def check_zeros(before: Path, after: Path) -> None:
    """Raise BudgetError unless one saved model is zero wherever the other was masked, and zero.

    What is on disk counts: both files are read back, with the masks of the folder that was recovered.
    """
    from secateur.edit import Mask
    from secateur.errors import BudgetError
    from secateur.models import load_edits
    from secateur.models.folder import read_tensors

    here, there = read_tensors(before / "model.safetensors"), read_tensors(after / "model.safetensors")
    filled, name = 0, ""
    for edit in load_edits(before):
        if not isinstance(edit, Mask):
            continue
        gone = edit.site.expand(~edit.keep)
        for part in edit.site.parts:
            pair = [part.view(values[part.name]) for values in (here, there) if part.name in values]
            if any(tuple(seen.shape) != part.shape for seen in pair) or len(pair) < 2:
                continue  # cut since then
            wrong = int((gone[part.key] & (pair[0] == 0) & (pair[1] != 0)).sum())
            filled, name = filled + wrong, part.name if wrong else name
    if filled:
        raise BudgetError(
            f"{before} was recovered with its zeros in place",
            f"{filled:,} weights of {after} are no longer zero, some in {name}",
            "Do not use that folder, and report this: the zeros were there before it was saved.",
        )
