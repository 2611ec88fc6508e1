"""The structure of the package: arrows go down only, every module says its one job, what is public is documented."""

import ast
import doctest
import importlib
import re
import subprocess
import sys
from graphlib import TopologicalSorter

import pytest

from apudae.attacks import ATTACKS, PARAMETERS
from apudae.checkpoints import ARCHITECTURES
from apudae.datasets import DATASETS
from apudae.evaluation.pages import MARK, pages, with_tables
from apudae.files import ROOT
from apudae.models import autoencoders

PACKAGE = ROOT / "apudae"
MODULES = sorted(PACKAGE.rglob("*.py"))
# from the ground up; a module may import from its own line and from those above it
LAYERS = [
    ["names", "contracts", "compat"],
    ["files", "processes", "batching", "autograd", "plots"],
    ["datasets", "models"],
    ["attacks", "purification"],
    ["training"],
    ["baselines"],
    ["checkpoints"],
    ["evaluation"],
    ["batch"],
]
FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef


def name_of(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


every_module = pytest.mark.parametrize("module", MODULES, ids=name_of)


def imported(path):
    """The modules of the package that `path` imports, wherever in the file."""
    own, found = name_of(path).split("."), set()
    package = own if path.name == "__init__.py" else own[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1] + (node.module.split(".") if node.module else [])
            for alias in node.names:
                whole = ".".join([*base, alias.name])
                found.add(whole if whole in map(name_of, MODULES) else ".".join(base))
    return found - {name_of(path)}


def layer(name):
    part = name.split(".")[1] if "." in name else name
    return next(position for position, names in enumerate(LAYERS) if part in names)


def functions(module):
    return [node for node in ast.walk(ast.parse(module.read_text())) if isinstance(node, FUNCTIONS)]


@every_module
def test_arrows_go_down(module):
    name = name_of(module)
    if name != "apudae":  # its __init__ gathers the public names
        up = [other for other in imported(module) if other != "apudae" and layer(other) > layer(name)]
        assert not up, f"{name} imports from above: {up}"


def test_no_circles():
    graph = {name_of(path): imported(path) for path in MODULES if name_of(path) != "apudae"}
    # a package's __init__ gathers names of its modules, which may import a sibling but never the gathering
    assert list(TopologicalSorter(graph).static_order())


@every_module
def test_module_says_its_one_job(module):
    first = ast.get_docstring(ast.parse(module.read_text())).split("\n\n")[0]
    assert first.endswith((".", "`."))
    assert len(first) <= 240, "one job fits into one sentence"


@every_module
def test_what_is_public_is_documented(module):
    tree = ast.parse(module.read_text())
    public = [n for n in tree.body if isinstance(n, FUNCTIONS | ast.ClassDef) and not n.name.startswith("_")]
    assert [node.name for node in public if not ast.get_docstring(node)] == []


@every_module
def test_examples_in_docstrings_run(module):
    found = doctest.testmod(importlib.import_module(name_of(module)))
    assert found.failed == 0
    assert found.attempted == module.read_text().count(">>> ")


@pytest.mark.slow
def test_the_readmes_example_runs():
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    exec(example, {})


@pytest.mark.parametrize("page", pages(), ids=lambda path: str(path.relative_to(ROOT)))
def test_tables_of_the_pages_are_made_from_the_rows(page):
    text = page.read_text(encoding="utf-8")
    assert MARK.search(text)
    assert with_tables(text) == text, "make readme"


@every_module
def test_functions_are_annotated(module):
    for function in functions(module):
        arguments = function.args.posonlyargs + function.args.args + function.args.kwonlyargs
        arguments += [extra for extra in (function.args.vararg, function.args.kwarg) if extra]
        bare = [a.arg for a in arguments if a.annotation is None and a.arg not in ("self", "cls", "ctx")]
        assert not bare, f"{function.name}: {bare}"
        assert function.returns is not None, function.name


@every_module
def test_nothing_is_set_behind_the_back(module):
    """No writes to the environment, no classes exchanged, no data set told by the start of its name."""
    text = module.read_text()
    assert "os.environ[" not in text.replace("os.environ[name]", "")
    assert "environ |=" not in text
    assert "__class__" not in text
    assert 'startswith("mnist' not in text


@pytest.mark.parametrize("words", [["check"], ["format", "--check"]], ids=" ".join)
def test_ruff(words):
    ruff = subprocess.run([sys.executable, "-m", "ruff", *words, "."], cwd=ROOT, capture_output=True, text=True)
    assert ruff.returncode == 0, ruff.stdout + ruff.stderr


# --- what CONTRIBUTING.md says is noticed -----------------------------------------------------------------------------


def test_every_data_set_is_described():
    rows = re.findall(r"^\| `([^`]+)` \|", (ROOT / "data" / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(rows) == sorted([*DATASETS, "folder:PATH"])
    (line,) = re.findall(
        r"^  datasets/ +(.*), and the registry", (ROOT / "README.md").read_text(encoding="utf-8"), re.M
    )
    assert sorted(line.split(", ")) == sorted(rows), "README's tree"


def test_every_autoencoder_can_be_saved_and_loaded():
    classes = {kind for kind in vars(autoencoders).values() if isinstance(kind, type)}
    ours = {kind for kind in classes if issubclass(kind, autoencoders.Autoencoder)} - {autoencoders.Autoencoder}
    assert ours <= set(ARCHITECTURES.values())
    assert all(kind().architecture["name"] == name for name, kind in ARCHITECTURES.items())


def test_every_attack_of_the_tables_is_an_attack():
    assert set(PARAMETERS) <= set(ATTACKS)


def test_every_notebook_stands_in_their_readme():
    listed = re.findall(r"\((\w+)\.ipynb\)", (ROOT / "notebooks" / "README.md").read_text(encoding="utf-8"))
    assert {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")} == set(listed)
