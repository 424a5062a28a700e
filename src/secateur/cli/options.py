"""Options that verbs share, and those made from the fields of a method."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import click

from secateur.cli.terminal import Terminal

F = TypeVar("F", bound=Callable[..., Any])

SETTINGS = "secateur.settings"  # of the method: name -> text, as given
TASK = "secateur.task"  # of the task: name -> text, as given
ARGS = "secateur.args"  # the arguments as they came
MANY = ("tuple", "list", "Sequence")  # how types of several values are written


class Verb(click.Command):
    """A command that knows `--task.KEY`, and with a METHOD argument every field of the method as an option."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Find the method, make its options, then parse as usual."""
        ctx.meta[ARGS] = list(args)
        args = [_dashed(arg) for arg in args]
        ctx.meta["extra"] = {}
        if any(isinstance(p, click.Argument) and p.name == "method" for p in self.params):
            args = self._for_method(ctx, args)
        self._dotted(ctx, args, "task", TASK)
        return super().parse_args(ctx, args)

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """Those written down, and those made for this call."""
        return [*super().get_params(ctx), *(option for option, _, _ in ctx.meta.get("extra", {}).values())]

    def invoke(self, ctx: click.Context) -> Any:
        """Set the options made for this call apart, and run."""
        ctx.meta[SETTINGS], ctx.meta[TASK] = {}, {}
        for name, (_, where, key) in ctx.meta["extra"].items():
            value = ctx.params.pop(name, None)
            value = ",".join(value) if isinstance(value, tuple) and value else value
            if value is not None and value != ():
                ctx.meta[where][key] = value
        return super().invoke(ctx)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The method's settings first, then the rest."""
        made = [o for o, where, _ in ctx.meta.get("extra", {}).values() if where == SETTINGS]
        rows = [row for option in made if (row := option.get_help_record(ctx))]
        if rows:
            with formatter.section(f"Settings of {ctx.meta['method']}"):
                formatter.write_dl(rows)
        options = [p for p in self.params if isinstance(p, click.Option)]
        with formatter.section("Options"):
            formatter.write_dl([row for p in options if (row := p.get_help_record(ctx))])

    def _for_method(self, ctx: click.Context, args: list[str]) -> list[str]:
        from secateur.method import load, names
        from secateur.recipe import is_recipe, settings_of

        sure, bare = self._bare(args)
        if bare and is_recipe(bare[0]) and not any(a in names() or is_recipe(a) for a in sure[1:]):
            from secateur.recipe import read

            model = read(bare[0]).model
            if not model:
                raise click.UsageError(f"{bare[0]} names no model: give MODEL before it.", ctx)
            args = [model, *args]  # the recipe says what is to be pruned
            sure, bare = [model, *sure], [model, *bare]
        found = next((a for a in bare[1:] if is_recipe(a) or a.replace("-", "_") in names()), None)
        found = sure[1] if len(sure) > 1 else found
        if found is None:
            unknown = next((a.partition("=")[0] for a in args if a.startswith("--") and not self._knows(a)), None)
            if sure and unknown is not None:
                raise click.UsageError(f"Missing argument 'METHOD', and {unknown} is no option without one.", ctx)
            return args
        if is_recipe(found):
            from secateur.recipe import read

            steps = read(found).steps
            if len(steps) != 1:
                return args
            kind, name = type(steps[0]), steps[0].name
        else:
            name = found if found in names() else found.replace("-", "_")
            kind = load(name)
        ctx.meta["method"] = name
        taken = {opt for p in self.params for opt in (*p.opts, *p.secondary_opts)}
        for setting in settings_of(kind).values():
            option = _option(name, setting, taken, kind)
            ctx.meta["extra"][option.name] = (option, SETTINGS, setting.name)
            if setting.has_fields:
                self._dotted(ctx, args, setting.name.replace("_", "-"), SETTINGS)
        return args

    def _dotted(self, ctx: click.Context, args: Sequence[str], head: str, where: str) -> None:
        """An option for every `--head.KEY` among the arguments."""
        for arg in args:
            match = re.fullmatch(rf"--({re.escape(head)}\.([\w.-]+))(=.*)?", arg, re.DOTALL)
            if match is None:
                continue
            key = (match[2] if where == TASK else match[1]).replace("-", "_")
            name = "dotted_" + re.sub(r"\W", "_", match[1])
            option = click.Option([name, f"--{match[1]}"], metavar="VALUE", hidden=True)
            ctx.meta["extra"][name] = (option, where, key)

    def _knows(self, arg: str) -> bool:
        """Whether an option is the verb's own."""
        own = {opt for p in self.params for opt in (*p.opts, *p.secondary_opts)} | {"--", "--help"}
        return arg.partition("=")[0] in own or arg.startswith("--task.")

    def _bare(self, args: Sequence[str]) -> tuple[list[str], list[str]]:
        """Arguments that are surely no option's value, and all that may be none."""
        takes = {opt: not (p.is_flag or p.count) for p in self.params if isinstance(p, click.Option) for opt in p.opts}
        takes |= {opt: False for p in self.params for opt in p.secondary_opts}
        takes |= {"-h": False, "--help": False}
        sure, bare, place = [], [], 0
        while place < len(args):
            arg = args[place]
            if arg.startswith("-") and len(arg) > 1:
                if "=" not in arg and takes.get(arg):
                    place += 1
                elif "=" not in arg and arg not in takes and place + 1 < len(args):
                    following = args[place + 1]
                    if not following.startswith("--"):
                        bare.append(following)
                        place += 1
            else:
                sure.append(arg)
                bare.append(arg)
            place += 1
        return sure, bare


def _dashed(arg: str) -> str:
    """`--rewind_to=5` as `--rewind-to=5`."""
    if not arg.startswith("--") or arg == "--":
        return arg
    name, sign, value = arg.partition("=")
    return name.replace("_", "-") + sign + value


def option_name(method: str, name: str, taken: set[str]) -> str:
    """The option of a setting; with the method's name before it where a verb has one of that name already."""
    plain = f"--{name.replace('_', '-')}"
    return plain if plain not in taken else f"--{method.replace('_', '-')}.{name.replace('_', '-')}"


def _option(method: str, setting: Any, taken: set[str], kind: type) -> click.Option:
    from dataclasses import MISSING

    from secateur.recipe import text_of_value

    default = "" if setting.default is MISSING else text_of_value(setting.default)
    shown = f"[default: {default or 'none'}]" if setting.default is not MISSING else "[required]"
    words = _words_for(setting, kind)
    comment = setting.comment + ("." if words and setting.comment and setting.comment[-1] not in ".!?" else "")
    say = " ".join(filter(None, [comment, words, shown]))
    option, name = option_name(method, setting.name, taken), f"field_{setting.name}"
    if setting.hint is bool:
        negative = f"--no-{option[2:]}"
        return click.Option([name, f"{option}/{negative}"], default=None, help=say)
    many = setting.written.startswith(MANY)  # --protect stem --protect head, as well as --protect stem,head
    return click.Option([name, option], metavar=metavar(setting), help=say, multiple=many)


def metavar(setting: Any) -> str:
    """What kind of value a setting takes, in a word."""
    if setting.choices:
        return "|".join(setting.choices)
    if setting.part is not None:
        return setting.part.__name__.upper()
    names = {"float": "NUMBER", "int": "COUNT", "str": "TEXT", "bool": "true|false", "Method": "METHOD"}
    if setting.written in names:
        return names[setting.written]
    if setting.written.startswith(MANY):
        return "A,B,..."
    plain = setting.written.replace(" | None", "")
    return names.get(plain, "VALUE")


def _words_for(setting: Any, kind: type) -> str:
    """The parts that fit a setting, with their fields, which are `--setting.FIELD`."""
    if setting.part is None:
        return ""
    import sys

    from secateur.axes import words
    from secateur.recipe import fitting, settings_of

    shown = []
    for word, part in sorted(fitting(setting.hint, words(sys.modules[kind.__module__])).items()):
        word = {"nm": "N:M", "blocks": "RxC"}.get(word, word)
        own = [] if word in ("N:M", "RxC") else list(settings_of(part))
        shown.append(word + (f" (.{', .'.join(own)})" if own else ""))
    return f"One of: {', '.join(shown)}." if shown else ""


def spoken(function: F) -> F:
    """--json, --quiet, --debug."""
    for decorate in (
        click.option("--debug", is_flag=True, expose_value=False, help="Show where an error came from."),
        click.option("--quiet", is_flag=True, help="Say nothing but errors."),
        click.option(
            "--json", "as_json", is_flag=True, help="One JSON value on standard output, and nothing else there."
        ),
    ):
        function = decorate(function)
    return function


def running(function: F) -> F:
    """How a model is opened and run."""
    for decorate in (
        click.option("--online", is_flag=True, help="Allow downloads from the Hugging Face hub."),
        click.option("--threads", type=click.IntRange(1), metavar="N", help="Processor threads to use."),
        click.option("--dtype", metavar="TYPE", help="float32, bfloat16, float16 or float64. [default: float32]"),
        click.option("--device", metavar="DEVICE", help="cpu, cuda, cuda:1, mps. [default: cpu]"),
        click.option("--seed", type=int, metavar="N", help="What all randomness is drawn from. [default: 0]"),
    ):
        function = decorate(function)
    return function


def measuring(function: F) -> F:
    """On what a model is calibrated and measured."""
    for decorate in (
        click.option(
            "--eval-split", default="val", show_default=True, metavar="SPLIT", help="Where quality is measured."
        ),
        click.option(
            "--task",
            metavar="TASK",
            help="A ready-made task, a text file or folder, or module:function; --task.KEY sets one of its settings,"
            " such as --task.window 512. [default: python-docs for language models, the usual one of image models]",
        ),
    ):
        function = decorate(function)
    return function


def looking(function: F) -> F:
    """--zero-shot, --limit, --damage."""
    for decorate in (
        click.option(
            "--damage",
            type=click.IntRange(0),
            default=64,
            show_default=True,
            metavar="N",
            help="Examples that are compared one by one: which got worse, and where the top answer changed.",
        ),
        click.option(
            "--limit", type=click.IntRange(1), metavar="N", help="Questions of each zero-shot task. [default: all]"
        ),
        click.option(
            "--zero-shot",
            metavar="A,B,...",
            help="Multiple-choice questions, asked by the lm-eval harness: arc_easy, arc_challenge, boolq_no_passage,"
            " openbookqa, piqa, social_iqa, winogrande, or a .jsonl file of yours.",
        ),
    ):
        function = decorate(function)
    return function


def terminal(params: Mapping[str, Any]) -> Terminal:
    """Where a verb with these options speaks."""
    return Terminal(quiet=bool(params.get("quiet")), as_json=bool(params.get("as_json")))


def command_line(ctx: click.Context) -> str:
    """The command as it was typed, to be pasted into a shell."""
    import shlex

    return shlex.join(["secateur", ctx.info_name or "", *ctx.meta.get(ARGS, [])])
