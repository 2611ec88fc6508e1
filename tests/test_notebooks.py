"""The anatomy of a notebook, as the design states it. That they run is for nbval (`make test`)."""

import ast
import io
import json
import re
import tokenize

import nbformat
import pytest

from apudae import files
from apudae.batch.parameters import check_parameters
from apudae.files import ROOT

PATHS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PLOTLY = "application/vnd.plotly.v1+json"
MACHINE_PATHS = ("/work/", "/home/", "/root/", "/tmp/", "/Users/")


@pytest.fixture(params=PATHS, ids=lambda path: path.stem)
def path(request):
    return request.param


@pytest.fixture
def cells(path):
    return nbformat.read(path, as_version=4).cells


def code(cells):
    return [cell for cell in cells if cell.cell_type == "code"]


def tags(cell):
    return cell.metadata.get("tags", [])


def parameters(cells):
    (cell,) = [cell for cell in code(cells) if "parameters" in tags(cell)]
    return ast.parse(cell.source).body, cell.source


def test_numbers_run_from_00():
    assert [path.stem[:3] for path in PATHS] == [f"{number:02}_" for number in range(len(PATHS))]
    assert len(PATHS) >= 5


def test_is_valid(path):
    nbformat.validate(nbformat.read(path, as_version=4))


def test_first_cell_has_title_and_question(path, cells):
    assert cells[0].cell_type == "markdown"
    lines = cells[0].source.splitlines()
    assert re.fullmatch(rf"# {path.stem[:2]} · \S.*", lines[0])
    (question,) = [line for line in lines if line.startswith("**Question.** ")]
    assert question.endswith("?")
    for heading in ("*Reads*", "*Writes*", "*Runtime*"):
        assert heading in cells[0].source


def test_parameters_are_commented_literals(cells):
    statements, source = parameters(cells)
    assert code(cells)[0].source == source, "parameters come first"
    commented = {
        token.start[0]
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT and len(token.string) > 3
    }
    for statement in statements:
        assert isinstance(statement, ast.AnnAssign), "each parameter has a type"
        default = ast.literal_eval(statement.value)
        assert type(default).__name__ == statement.annotation.id
        assert statement.lineno in commented, f"{statement.target.id} needs a comment on its line"


def test_parameters_name_the_run_and_count_in_255ths(cells):
    defaults = {s.target.id: ast.literal_eval(s.value) for s in parameters(cells)[0]}
    assert defaults["run"] == "default"
    for name, default in defaults.items():
        if name.endswith("_255"):
            assert type(default) is int, f"{name} is a budget in 1/255"


def test_cells_are_short_and_define_nothing(cells):
    for cell in code(cells):
        if "parameters" not in tags(cell):
            assert len(cell.source.splitlines()) <= 15, cell.source
        assert not re.search(r"^\s*(async )?(def|class) ", cell.source, re.MULTILINE), cell.source


def test_every_claim_is_checked(cells):
    assert any(re.search(r"^\s*(assert |study\.expect\()", cell.source, re.MULTILINE) for cell in code(cells))


def test_is_committed_executed_in_order(cells):
    counts = [cell.execution_count for cell in code(cells)]
    assert counts == list(range(1, len(counts) + 1))
    errors = [output for cell in code(cells) for output in cell.outputs if output.output_type == "error"]
    assert not errors


def test_figures_are_interactive_and_static(cells):
    shown = [set(output.get("data", {})) for cell in code(cells) for output in cell.outputs]
    figures = [kinds for kinds in shown if PLOTLY in kinds]
    assert figures
    assert all("image/png" in kinds for kinds in figures), "GitHub shows the PNG"


def test_no_traces_of_progress_bars(cells):
    said = [output.text for cell in code(cells) for output in cell.outputs if output.output_type == "stream"]
    assert not [text for text in said if "\r" in text or not text.strip() or "%|" in text]


def test_nothing_red_and_no_table_wider_than_the_page(cells):
    said = [output for cell in code(cells) for output in cell.outputs if output.output_type == "stream"]
    assert not [output.text[:200] for output in said if output.name == "stderr"]
    lines = "".join(output.text for output in said).splitlines()
    assert not [line for line in lines if len(line) > 130 and re.search(r"\S {2,}\S", line)]


def test_no_paths_of_this_machine(cells):
    for cell in cells:
        outputs = [
            {kind: content for kind, content in output.get("data", {}).items() if kind != "image/png"}
            | {"text": output.get("text", "")}
            for output in cell.get("outputs", [])
        ]
        text = cell.source + re.sub(r"base64,[A-Za-z0-9+/=]+", "", json.dumps(outputs))
        assert not [place for place in MACHINE_PATHS if place in text]


def test_no_volatile_metadata(path):
    notebook = nbformat.read(path, as_version=4)
    assert set(notebook.metadata) <= {"kernelspec", "language_info"}
    for cell in notebook.cells:
        assert set(cell.metadata) <= {"tags"}, cell.metadata


def test_is_small_enough_for_git(path):
    assert path.stat().st_size < 2_000_000


SMALL = {"n": 4, "n_paths": 2, "n_aware": 2, "steps": 4, "batch": 4, "restarts": 2}
SMALL |= {"first": [0, 1], "second": [0, 1]}
ANY_ATTACKS = [path for path in PATHS if re.match(r"0[4-9]|1[01]|2[349]|3[02]", path.name)]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:not so in this setting")
@pytest.mark.parametrize("path", ANY_ATTACKS, ids=lambda path: path.stem)
def test_any_attacks_will_do(path, tmp_path, monkeypatch):
    """Without "clean" and "pgd", and with an attack of another size, a notebook goes through to its last claim."""
    attacks = ["fgsm", "bim@5/255"]
    monkeypatch.setattr(files, "RUNS", tmp_path)
    space = {}
    for cell in code(nbformat.read(path, as_version=4).cells):
        exec(cell.source, space)
        if "parameters" in tags(cell):
            wanted = SMALL | {"attacks": attacks, "table_attacks": attacks}
            given = {name: value for name, value in wanted.items() if name in space}
            space |= check_parameters(path.stem, given)
    assert list(space["study"].attacked) == ["clean", *attacks]
