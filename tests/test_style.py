"""The parts of STYLE.md that a machine can check."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "secateur"
SOURCES = sorted(PACKAGE.rglob("*.py"))
CODE = sorted([*SOURCES, *(ROOT / "claims").glob("*.py"), *(ROOT / "benchmarks").glob("*.py")])

HOMELESS = {"utils", "util", "helpers", "helper", "common", "base", "core", "misc", "manager", "handler", "handlers"}

# What may not be imported from where: imports point one way.
OUTSIDE = {"cli", "report", "export", "models", "tasks", "methods", "studies", "integrations", "plan", "recipe"}
WORDS = ("errors", "site", "graph", "cut", "evidence", "walk", "edit", "task", "train", "outcome")
FORBIDDEN = {
    **{word: OUTSIDE | {"axes", "method"} for word in WORDS},
    "axes": OUTSIDE,
    "methods": {"cli", "report", "export", "tasks", "models", "integrations", "plan", "recipe"},
    "studies": {"cli", "report", "export"},
    "method": {"cli", "report", "export", "models", "tasks"},
    "models": {"cli", "report", "methods", "studies"},
    "tasks": {"cli", "report", "methods", "studies", "axes"},
    "report": {"cli"},
}


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def imported(tree):
    """Every module of the package that is imported anywhere in a file, with the names taken from it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def crossings(layer, tree):
    """The imports of a file of a layer that point the wrong way."""
    taken = {name.split(".")[1] for name in imported(tree) if name.startswith("secateur.")}
    return sorted(taken & FORBIDDEN.get(layer, set()))


def called(tree):
    """The dotted names of everything that is called in a file."""
    return {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}


@pytest.fixture(scope="module")
def trees():
    return {path: ast.parse(path.read_text(encoding="utf-8")) for path in CODE}


def test_every_module_has_a_home_in_its_name():
    assert [name_of(p) for p in SOURCES if p.stem in HOMELESS or p.parent.name in HOMELESS] == []


def test_imports_point_one_way(trees):
    for path in SOURCES:
        layer = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        assert crossings(layer, trees[path]) == [], f"{name_of(path)} imports what lies above it"


def test_the_check_of_imports_sees_a_crossing():
    wrong = ast.parse("def f():\n    from secateur.methods.wanda import Wanda\n    import secateur.cli\n")
    assert crossings("axes", wrong) == ["cli", "methods"]


def test_relative_imports_are_not_used(trees):
    for path in SOURCES:
        found = [n for n in ast.walk(trees[path]) if isinstance(n, ast.ImportFrom) and n.level]
        assert not found, f"{name_of(path)} line {found[0].lineno} imports relatively"


def test_nothing_is_unpickled_nor_trusted(trees):
    for path, tree in trees.items():
        modules = {name.split(".")[0] for name in imported(tree)}
        assert not modules & {"pickle", "dill", "joblib", "cloudpickle"}, f"{name_of(path)} imports a pickle"
        for node in ast.walk(tree):
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                assert getattr(node.value, "value", True) is False, f"{name_of(path)} trusts remote code"
        assert "torch.save" not in called(tree), f"{name_of(path)} writes a pickle"


SEEDS = {"torch.manual_seed", "random.seed", "np.random.seed", "numpy.random.seed", "torch.cuda.manual_seed_all"}


def seeded_globally(tree):
    """Lines that seed the global generators, unless within a fork of them."""
    forks = [n for n in ast.walk(tree) if isinstance(n, ast.With) and "fork_rng" in ast.unparse(n.items[0])]
    within = {id(inner) for fork in forks for inner in ast.walk(fork)}
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and ast.unparse(n.func) in SEEDS]
    return [n.lineno for n in calls if id(n) not in within]


def test_no_global_seed_is_set(trees):
    for path in SOURCES:
        assert seeded_globally(trees[path]) == [], f"{name_of(path)} sets a global seed; use torch.Generator"


def test_the_check_of_seeds_sees_one():
    assert seeded_globally(
        ast.parse("torch.manual_seed(0)\nwith torch.random.fork_rng():\n    torch.manual_seed(1)")
    ) == [1]


def test_a_method_neither_prints_nor_opens_files(trees):
    for path in SOURCES:
        if path.relative_to(PACKAGE).parts[0] in ("methods", "axes"):
            assert not called(trees[path]) & {"print", "open"}, f"{name_of(path)} prints or opens a file"


def test_files_hold_no_history(trees):
    for path in SOURCES:
        text = path.read_text(encoding="utf-8")
        for word in ("TODO", "FIXME", "XXX", "HACK"):
            assert word not in text, f"{name_of(path)} holds a {word}: finish it, or write it to LOG.md"
