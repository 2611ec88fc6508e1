import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image

from apudae import files
from apudae.batch import notebooks, parameters
from apudae.batch.cli import main
from apudae.batch.html import page
from apudae.batch.notebooks import NotebookError, run_notebook, tagged_text
from apudae.batch.parameters import check_parameters, declared_parameters, from_here
from apudae.evaluation.results import read_results
from apudae.files import ROOT, RUNS, data_root

APUDAE = Path(sys.executable).with_name("apudae")

PARAMETERS = """steps: int = 3  # how many
rate: float = 0.5  # how fast
loud: bool = False  # whether
name: str = "seven"  # who
fail: bool = False  # break on purpose
run: str = "default"  # folder below data/runs/"""
FIGURE = """import plotly.graph_objects as go
import plotly.io as pio

pio.renderers.default = "plotly_mimetype"
go.Figure(go.Scatter(x=[0, 1, 2], y=[2, 0, 1]), layout={"title": {"text": "a zigzag"}})"""
PROGRESS = """import sys
from tqdm import tqdm

for leave in (True, False):
    for _ in tqdm(range(3), leave=leave):
        pass
    print("a warning", file=sys.stderr)
print("kept")"""


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A folder with one small notebook, 07_tiny, and an empty one for runs, in place of the repository's."""
    cells = [
        new_markdown_cell("# 07 · Tiny\n\n**Question.** Does it run?"),
        new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]}),
        new_code_cell(FIGURE),
        new_code_cell(PROGRESS),
        new_code_cell('print("steps", steps, "rate", rate)', metadata={"tags": ["result"]}),
        new_code_cell('assert not fail, "broken on purpose"'),
    ]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    (tmp_path / "notebooks").mkdir()
    nbformat.write(new_notebook(cells=cells, metadata=kernel), tmp_path / "notebooks" / "07_tiny.ipynb")
    monkeypatch.setattr(parameters, "NOTEBOOKS", tmp_path / "notebooks")
    monkeypatch.setattr(notebooks, "NOTEBOOKS", tmp_path / "notebooks")
    monkeypatch.setattr(files, "RUNS", tmp_path / "runs")
    monkeypatch.setenv("APUDAE_DATA", str(data_root()))
    return tmp_path / "runs"


def files_below(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


# --- parameters -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "given", "checked"),
    [
        ("steps", "12", 12),
        ("steps", 12, 12),
        ("steps", "010", 10),
        ("steps", "+4", 4),
        ("rate", "8/255", 8 / 255),
        ("rate", "8 / 255", 8 / 255),
        ("rate", "0.25", 0.25),
        ("rate", "2", 2.0),
        ("rate", 2, 2.0),
        ("rate", "1e-3", 0.001),
        ("rate", "1E3", 1000.0),
        ("loud", "true", True),
        ("loud", "False", False),
        ("loud", True, True),
        ("name", "12", "12"),
        ("name", "true", "true"),
        ("name", "a: b [", "a: b ["),
        ("name", "", ""),
    ],
)
@pytest.mark.usefixtures("tiny")
def test_parameters_take_the_type_of_their_default(name, given, checked):
    found = check_parameters("07_tiny", {name: given})
    assert found == {name: checked}
    assert type(found[name]) is type(checked)


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("steps", "many"),
        ("steps", "-1"),
        ("steps", "0x10"),
        ("steps", "1_000"),
        ("rate", "nan"),
        ("rate", ".nan"),
        ("rate", "inf"),
        ("rate", "1/0"),
        ("loud", "on"),
        ("steps", "1.5"),
        ("steps", 1.5),
        ("steps", "true"),
        ("steps", True),
        ("steps", ""),
        ("steps", None),
        ("steps", "[1"),
        ("steps", "{1: 2}"),
        ("steps", "a: b: c"),
        ("rate", "fast"),
        ("rate", "1e"),
        ("rate", True),
        ("rate", [0.5]),
        ("loud", "1"),
        ("loud", 1),
        ("loud", "loudly"),
        ("steps", 2**63),
        ("steps", "99999999999999999999"),
        ("rate", 10**400),
        ("name", 7),
        ("name", None),
    ],
)
@pytest.mark.usefixtures("tiny")
def test_ill_typed_parameter_is_named_with_what_it_needs(name, given):
    needed = {"steps": "int", "rate": "float", "loud": "bool", "name": "str"}[name]
    with pytest.raises(ValueError, match=f"parameter {name} of 07_tiny.*needed: {needed}"):
        check_parameters("07_tiny", {name: given})


def test_what_the_user_typed_counts_from_where_the_user_stands(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    for name in ("mine/net.v2.json", "05.json"):
        (tmp_path / name).write_text("{}")
    monkeypatch.chdir(tmp_path / "mine")
    given = {"dataset": "folder:../photos", "classifier": "net.v2", "daes": ["./net.v2", "mnist/dae", "python:a:b"]}
    given |= {"run": "net.v2", "output": "net.v2", "results": "net.v2", "n": 3, "dae": "folder", "magnet": "../05"}
    here = str(tmp_path / "mine" / "net.v2")
    made = {"dataset": f"folder:{tmp_path / 'photos'}", "classifier": here, "daes": [here, "mnist/dae", "python:a:b"]}
    assert from_here(given) == given | made | {"magnet": str(tmp_path / "05")}
    folders = ("folder:", "folder:@64", "folder:~/photos")
    for value in ("", *folders, "a\0b", "x" * 5000, "mnist/classifier", "timm:net.v2", 3.5, None):
        assert from_here({"it": value}) == {"it": value}
    assert from_here({"it": [[1, {}]]}) == {"it": [[1, {}]]}
    monkeypatch.chdir(ROOT / "data")
    assert from_here({"classifier": "checkpoints/mnist/dae"}) == {"classifier": "data/checkpoints/mnist/dae"}


@pytest.mark.parametrize("given", ["[3]", "[fgsm, 3]", "[[fgsm]]", "[true]", "fgsm", "{a: fgsm}"])
def test_lists_of_words_hold_words(given):
    with pytest.raises(ValueError, match="parameter attacks of 05_purify_a"):
        check_parameters("05_purify_a", {"attacks": given})


@pytest.mark.parametrize("given", ["[a]", "[.nan]", "[1, .inf]", "[true]", "[[1]]", "[1, null]"])
def test_lists_of_numbers_hold_numbers(given):
    assert check_parameters("03_attacks", {"factors": "[0, 8/255, .5]"}) == {"factors": [0.0, 8 / 255, 0.5]}
    with pytest.raises(ValueError, match="parameter factors of 03_attacks"):
        check_parameters("03_attacks", {"factors": given})


@pytest.mark.usefixtures("tiny")
def test_unknown_names_list_what_there_is():
    with pytest.raises(ValueError, match="'step' is unknown; there is: steps, rate, loud, name, fail, run"):
        check_parameters("07_tiny", {"steps": 3, "step": 3})
    with pytest.raises(ValueError, match="'08_huge' is unknown; there is: 07_tiny"):
        check_parameters("08_huge", {})


@pytest.mark.usefixtures("tiny")
def test_declared_parameters_carry_their_comments():
    declared = declared_parameters("07_tiny")
    assert declared["rate"] == (0.5, "how fast")
    assert list(declared) == ["steps", "rate", "loud", "name", "fail", "run"]


# --- a real run -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_failure_then_success(tiny):
    with pytest.raises(NotebookError, match=r"07_tiny, cell \d+: AssertionError: broken on purpose") as caught:
        run_notebook("07_tiny", {"fail": "true", "run": "mine"})
    failed = tiny / "mine" / "07_tiny.failed.ipynb"
    assert str(failed) in str(caught.value)
    assert files_below(tiny) == ["mine/07_tiny.failed.ipynb"]
    last = nbformat.read(failed, as_version=4).cells[-1]
    assert last.outputs[0].ename == "AssertionError"

    executed = run_notebook("07_tiny", {"rate": "2", "run": "mine"})
    assert executed == tiny / "mine" / "07_tiny.ipynb"
    assert files_below(tiny) == ["mine/07_tiny.html", "mine/07_tiny.ipynb"]
    assert [file.name for file in notebooks.NOTEBOOKS.iterdir()] == ["07_tiny.ipynb"]  # no sockets of the kernel
    assert tagged_text(executed, "result").strip() == "steps 3 rate 2.0"
    notebook = nbformat.read(executed, as_version=4)
    texts = [output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", [])]
    assert "".join(texts).count("a warning\n") == 2, "what a cell said beside its progress bars stays"
    assert any(text == "kept\n" for text in texts)
    assert not any("\r" in text for text in texts)

    page = executed.with_suffix(".html").read_text()
    assert "plotly-graph-div" in page
    assert "a zigzag" in page
    assert not re.search(r"<script[^>]+src=[^>]+plotly", page), "the page must draw its figures without a network"


def test_of_a_widget_its_text_is_kept(tmp_path):
    """A widget's view without its kernel is an error in JupyterLab, and a page would fetch its scripts."""
    data = {notebooks.WIDGET: {"model_id": "0"}, "text/plain": "live in JupyterLab"}
    bar = {notebooks.WIDGET: {"model_id": "1"}, "text/plain": " 50%|█████     | 1/2 [00:00<00:00]"}  # a library's own
    cell = new_code_cell("explorer", outputs=[new_output("display_data", bar), new_output("execute_result", data)])
    nbformat.write(new_notebook(cells=[cell], metadata={"widgets": {"state": {}}}), path := tmp_path / "it.ipynb")
    notebooks.without_progress(path)
    executed = nbformat.read(path, as_version=4)
    assert [output.data for output in executed.cells[0].outputs] == [{"text/plain": "live in JupyterLab"}]
    assert "widgets" not in executed.metadata


def test_page_asks_no_network_for_anything():
    """Formulas are MathML, drawn by the browser; a price in code is no formula."""
    formula = "$$x_{i+1} = x_i - \\alpha\\,\\mathrm{sign}\\,g < 1$$"
    source = f"# 08 · Maths\n\n{formula}\n\nHere $\\epsilon$ is small, and `$5 or $6`."
    made = page(new_notebook(cells=[new_markdown_cell(source)]))
    assert made.count("<math") == 2
    assert "$5 or $6" in made
    assert "\\alpha" not in made
    assert "<title>08 · Maths</title>" in made
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", made)


@pytest.mark.slow
def test_command_prints_the_result_and_both_paths(tiny, monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", ["apudae", "run", "notebooks/07_tiny.ipynb"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    printed = capfd.readouterr().out
    assert "steps 3 rate 0.5" in printed
    assert "default/07_tiny.ipynb" in printed
    assert "default/07_tiny.html" in printed
    assert files_below(tiny) == ["default/07_tiny.html", "default/07_tiny.ipynb"]


# --- the command line -------------------------------------------------------------------------------------------------

UNTOUCHED = "test-of-bad-input"  # the run folder that none of the commands below may make
IN_RUN = ("-p", "run", UNTOUCHED)
BAD_COMMANDS = {
    "unknown notebook": (["99_nothing", *IN_RUN], "99_nothing"),
    "unknown parameter": (["01_train_classifier", *IN_RUN, "-p", "stepz", "3"], "stepz"),
    "ill-typed value": (["01_train_classifier", *IN_RUN, "-p", "steps", "many"], "many"),
    "value that is no YAML": (["01_train_classifier", *IN_RUN, "-p", "steps", "[1"], "steps"),
    "unknown key in a file": (["01_train_classifier", *IN_RUN, "-f", "unknown.yaml"], "stepz"),
    "ill-typed value in a file": (["01_train_classifier", *IN_RUN, "-f", "ill-typed.yaml"], "many"),
    "missing file": (["01_train_classifier", *IN_RUN, "-f", "missing.yaml"], "missing.yaml"),
    "file with a list": (["01_train_classifier", *IN_RUN, "-f", "list.yaml"], "list.yaml"),
    "empty file": (["01_train_classifier", *IN_RUN, "-f", "empty.yaml"], "empty.yaml"),
    "file that is no YAML": (["01_train_classifier", *IN_RUN, "-f", "broken.yaml"], "broken.yaml"),
    "file that is no text": (["01_train_classifier", *IN_RUN, "-f", "bytes.yaml"], "bytes.yaml"),
}
FILES = {
    "unknown.yaml": b"steps: 3\nstepz: 3\n",
    "ill-typed.yaml": b"steps: many\n",
    "list.yaml": b"- steps\n- 3\n",
    "empty.yaml": b"",
    "broken.yaml": b"steps: [3\n",
    "bytes.yaml": b"\xff\xfe\x00\x01",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("commands")
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
    return folder


def command(folder, *words):
    return subprocess.run([APUDAE, *words], cwd=folder, capture_output=True, text=True, timeout=600)


def check_refused(returned, status, errors, named):
    assert status == 2
    assert returned == ""
    assert "Traceback" not in errors
    assert len(errors.splitlines()) == 1, errors
    assert errors.startswith("apudae: ")
    assert named in errors
    assert not (RUNS / UNTOUCHED).exists()


@pytest.mark.parametrize("case", BAD_COMMANDS)
def test_bad_input_is_one_line_and_status_2(case, folder, monkeypatch, capfd):
    words, named = BAD_COMMANDS[case]
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["apudae", "run", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    printed = capfd.readouterr()
    check_refused(printed.out, ended.value.code, printed.err, named)


@pytest.mark.slow
def test_installed_command_refuses_as_well(folder):
    """One of these cases through the installed command, where imports could print warnings."""
    words, named = BAD_COMMANDS["unknown parameter"]
    process = command(folder, "run", *words)
    check_refused(process.stdout, process.returncode, process.stderr, named)


@pytest.mark.slow
def test_list_of_notebooks_shows_questions_and_parameters(folder):
    listed = command(folder, "notebooks")
    assert (listed.returncode, listed.stderr) == (0, "")
    flat = " ".join(listed.stdout.split())
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        first = nbformat.read(path, as_version=4).cells[0].source
        question = next(line for line in first.splitlines() if line.startswith("**Question.**"))
        assert path.stem in listed.stdout
        assert question.removeprefix("**Question.** ") in flat
        for name, (default, comment) in declared_parameters(path.stem).items():
            assert f"{name} = {default!r} {comment}" in flat


def test_help_names_the_commands(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["apudae", "-h"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    names = re.findall(r"^  (\w+)  ", capsys.readouterr().out.split("Commands:")[1], re.M)
    assert names == ["notebooks", "report", "run", "sweep"]


@pytest.mark.slow
def test_a_folder_of_ones_own_images_goes_the_whole_way(tmp_path, monkeypatch):
    """README's own commands: train a classifier and an autoencoder on small colour images, attack, purify."""
    generator = np.random.default_rng(0)
    for channel, name in enumerate(("red", "green", "blue")):
        (tmp_path / "mine" / name).mkdir(parents=True)
        for index in range(40):
            pixels = generator.integers(0, 90, (16, 16, 3), dtype=np.uint8)
            pixels[4:12, 4:12, channel] = 200
            Image.fromarray(pixels).save(tmp_path / "mine" / name / f"{index}.png")
    module = "import torch\n\ndef build():\n    return torch.nn.Conv2d(3, 3, 3, padding=1)\n"
    (tmp_path / "my_networks.py").write_text(module)
    general = ["-p", "dataset", "folder:mine", "-p", "run", "mine"]
    ball, short = ["-p", "epsilon", "8/255"], ["-p", "batch_size", "32", "-p", "steps", "40"]
    named = ["-p", "classifier", "runs/mine/resnet8", "-p", "attacks", "[bim]", "-p", "n", "12"]
    environment = os.environ | {"APUDAE_RUNS": str(tmp_path / "runs"), "PLOTLY_RENDERER": "plotly_mimetype"}
    for words in (
        ["01_train_classifier", *ball, *short],
        ["02_train_dae", "-p", "width", "8", *short],
        ["05_purify_a", *ball, *named, "-p", "dae", "runs/mine/dae"],
        ["05_purify_a", *ball, *named, "-p", "dae", "python:my_networks:build"],
    ):
        ran = subprocess.run(
            [APUDAE, "run", *words, *general], env=environment, cwd=tmp_path, capture_output=True, text=True
        )
        assert ran.returncode == 0, ran.stderr
    rows = read_results(tmp_path / "runs" / "mine" / "purified.csv")
    assert set(rows.classifier) == {str(tmp_path / "runs" / "mine" / "resnet8")}, (
        "named so that anybody anywhere finds it"
    )
    assert set(rows.dataset) == {f"folder:{tmp_path / 'mine'}"}
    assert set(rows.dae) == {str(tmp_path / "runs" / "mine" / "dae"), "python:my_networks:build"}
    assert set(rows[(rows.attack == "clean") & (rows.purifier == "none")].accuracy) == {1}
    place, command = rows[rows.dae == "python:my_networks:build"].command.iloc[0].split(" && ")
    assert shlex.split(place) == ["cd", str(tmp_path)]
    own = [*ball, *named, "-p", "dae", "python:my_networks:build", *general]
    given = dict(zip(own[1::3], own[2::3], strict=True))
    words = shlex.split(command)
    monkeypatch.chdir(tmp_path)
    again = dict(zip(words[4::3], words[5::3], strict=True))
    assert words[:3] == ["apudae", "run", "05_purify_a"]
    assert check_parameters("05_purify_a", again) == from_here(check_parameters("05_purify_a", given))
