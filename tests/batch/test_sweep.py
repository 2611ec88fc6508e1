"""A sweep from its file to its tables, on a copy of the repository whose notebooks take no time."""

import contextlib
import importlib.util
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import slurm
import torch
import yaml
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from apudae.batch import snakemake, sweep
from apudae.batch import step as one_step
from apudae.batch.snakemake import gpu_places, read_profile
from apudae.batch.step import gpu_place
from apudae.batch.sweep import read_sweep
from apudae.files import ROOT

pytestmark = pytest.mark.slow

APUDAE = [sys.executable, "-c", "from apudae.batch.cli import main; main()"]
MARK = "APUDAE_TEST"  # set in the environment of everything that a test starts

ROWS = """dataset: str = "mnist5k"  # a data set
dae: str = "mnist/dae"  # a checkpoint
purifier: str = "A"  # a preset
wait: float = 0.0  # seconds
fail: bool = False  # break on purpose
run: str = "default"  # folder below data/runs/
results: str = ""  # CSV file for the rows"""
WRITE = """import random
import time
from pathlib import Path

from IPython.display import display

display({"application/vnd.plotly.v1+json": {"data": [{"type": "scatter", "y": [1, 2]}], "layout": {}}}, raw=True)

time.sleep(wait)
folder, path = Path("../data/runs") / run, Path("..") / results
before = (folder / "seen.txt").read_text() if (folder / "seen.txt").exists() else ""
names = "dataset,split,n,metric,classifier,dae,kind,attack,epsilon,attack_parameters,position"
names += ",purifier,steps,step_size,purifier_parameters,seed,device"
facts = f"{dataset},test,10,top-1,mnist/classifier,{dae},attack,{path.stem},,{{}},,{purifier},,,{{}},0,cpu"
figures = "7,0.7,0.4,0.9"
seconds = random.random()
path.write_text(f"{names},correct,accuracy,ci_low,ci_high,seconds,notebook,commit,command\\n{facts},{figures},{seconds},01,c,x\\n")
assert not fail, "broken on purpose" """
READ = """results: str = ""  # rows to read
run: str = "default"  # folder below data/runs/"""


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """A copy of the repository with two quick notebooks, 01_rows and 02_read, so that nothing is written into ours."""
    copy = tmp_path_factory.mktemp("repository")
    for folder in ("apudae", "workflow"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "data").mkdir()
    (copy / "data" / "checkpoints").symlink_to(ROOT / "data" / "checkpoints")
    write(copy, "01_rows", ROWS, WRITE)
    write(copy, "17_results_tables", READ, 'assert open("../" + results).read().count("\\n") == 3; print("two rows")')
    write(copy, "02_read", READ, 'print(len(open("../" + results).readlines()))')
    return copy


def write(repository, name, parameters, code):
    cells = [
        new_markdown_cell(f"# {name}\n\n**Question.** Does it run?"),
        new_code_cell(parameters, metadata={"tags": ["parameters"]}),
        new_code_cell(code, metadata={"tags": ["result"]}),
    ]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    (repository / "notebooks").mkdir(exist_ok=True)
    nbformat.write(new_notebook(cells=cells, metadata=kernel), repository / "notebooks" / f"{name}.ipynb")


def start(repository, *words, command="sweep"):
    """A launcher in the repository."""
    path = os.pathsep.join([str(repository), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, MARK: str(repository)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    heard = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}  # ignored in a background job
    return subprocess.Popen([*APUDAE, command, *words], cwd=repository, env=environment, **heard, **pipes)


def run(repository, *words, command="sweep"):
    """Its exit status and what it said."""
    with start(repository, *words, command=command) as process:
        try:
            said, _ = process.communicate(timeout=1200)
            return process.returncode, said
        finally:
            process.kill()


def written(repository, name, **content):
    path = repository / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content))
    return str(path)


def started(repository):
    """Command lines of the living processes that launchers in the repository started, by process number."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            if f"{MARK}={repository}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                found[int(folder.name)] = (folder / "cmdline").read_bytes().decode()
    return found


# --- what is refused before anything starts ---------------------------------------------------------------------------

STEP = {"notebook": "05_purify_a"}
REFUSED = {
    "no steps": ({"parameters": {"n": 5}}, "'steps' is a required property"),
    "unknown key": ({"steps": {"a": STEP | {"needs": []}}}, "'needs' was unexpected"),
    "bad name": ({"steps": {"A b": STEP}}, "'A b' does not match"),
    "name of the merge": ({"steps": {"results": STEP}}, "'results' does not match"),
    "not a list": ({"steps": {"a": STEP | {"after": "b"}}}, "'b' is not of type 'array'"),
    "unknown notebook": ({"steps": {"a": {"notebook": "05_purify_z"}}}, "'05_purify_z' is unknown"),
    "unknown step": ({"steps": {"a": STEP | {"after": ["b"]}}}, "step 'b' is unknown; there is: a, results"),
    "unknown parameter": ({"steps": {"a": STEP | {"parameters": {"m": 5}}}}, "'m' is unknown"),
    "unknown general parameter": (
        {"parameters": {"m": 5}, "steps": {"a": STEP}},
        "no notebook of its steps has the parameter 'm'",
    ),
    "ill-typed": ({"steps": {"a": STEP | {"parameters": {"n": "many"}}}}, "needed: int"),
    "unknown data set": (
        {"steps": {"a": {"notebook": "03_attacks", "parameters": {"dataset": "mnist6k"}}}},
        "data set 'mnist6k' is unknown",
    ),
    "missing folder": (
        {"steps": {"a": {"notebook": "03_attacks", "parameters": {"dataset": "folder:nowhere"}}}},
        "nowhere is no folder",
    ),
    "unknown variant": (
        {"steps": {"a": {"notebook": "12_ablate_steps", "parameters": {"purifier": "H"}}}},
        "purifier 'H' is unknown; there is: direct, A",
    ),
    "missing checkpoint": ({"steps": {"a": STEP | {"parameters": {"dae": "mnist/none"}}}}, "'mnist/none' is unknown"),
    "cycle": (
        {"steps": {"a": STEP | {"after": ["b"]}, "b": STEP | {"after": ["c"]}, "c": STEP | {"after": ["a"]}}},
        "form a cycle: ",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_sweep_file_is_refused_in_one_sentence(case, tmp_path):
    content, named = REFUSED[case]
    path = tmp_path / "bad.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match=r"bad\.yaml") as refused:
        read_sweep(path)
    assert named in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["mnist", "test", "cifar10", "cifar10-jpeg", "gpu"])
def test_shipped_sweep_files_are_sound(name):
    resolved = read_sweep(ROOT / "workflow" / "config" / f"{name}.yaml")
    assert resolved["order"][-1] == "tables"
    assert resolved["order"].index("attacks") < resolved["order"].index("purify_a") < resolved["order"].index("results")
    runs = {
        "cifar10": [],
        "cifar10-jpeg": ["held_out", "adversarial", "resnet8", "targets"],
        "gpu": ["held_out", "adversarial", "resnet"],
    }  # other images, classifiers
    others = {f"{name}/{run}" for run in runs.get(name, ["held_out"])}
    assert {step["parameters"]["run"] for step in resolved["steps"].values()} == {name} | others
    assert "tables" not in resolved["merged"]


def test_cifar10_trains_its_networks_before_it_needs_them(monkeypatch):
    target = "cifar10/resnet18"  # of a package
    monkeypatch.setattr(sweep, "load_model", lambda name: name == target or pytest.fail(f"{name} is not there yet"))
    resolved = read_sweep(ROOT / "workflow" / "config" / "cifar10-jpeg.yaml")
    place = resolved["order"].index
    assert place("train_dae") < place("direct")
    for name, step in resolved["steps"].items():
        given = step["parameters"]
        for key in {"classifier", "dae"} & given.keys():
            if given[key] == target:
                continue
            made_by = [
                n for n, s in resolved["steps"].items() if s["parameters"].get("output", "").endswith(given[key])
            ]
            assert place(made_by[0]) < place(name)
        if name.startswith(("purify", "direct", "tables")):
            assert given["step_size"] == 1 / 255
        if step["notebook"] in ("01_train_classifier", "02_train_dae", "03_attacks"):
            assert given["dataset"] == ("bsds500" if name in ("train_off_grid", "train_told") else "cifar10-jpeg")
    assert resolved["steps"]["train_classifier"]["parameters"]["epsilon"] == 8 / 255
    given = resolved["steps"]["purify_a"]["parameters"]
    assert [given["steps"], *given["further"]] == [15, 18, 24], "the paper's n, and ours"


@pytest.mark.parametrize("dataset", ["", "cifar10-jpeg"])
def test_gpu_lane_trains_what_it_measures_and_takes_another_data_set_by_one_word(dataset):
    """No network that it trains is there yet: `read_sweep` would refuse one that no step writes."""
    resolved = read_sweep(ROOT / "workflow" / "config" / "gpu.yaml", given={"dataset": dataset} if dataset else None)
    steps, place = resolved["steps"], resolved["order"].index
    assert all(step["gpu"] == 1 for name, step in steps.items() if name != "tables"), "each step takes the GPU"
    written = {step["parameters"]["output"]: name for name, step in steps.items() if "output" in step["parameters"]}
    assert len(written) == 6
    used = set()
    for name, step in steps.items():
        given = step["parameters"]
        networks = [given.get(key, "") for key in ("classifier", "dae", "other", "initial")] + given.get(
            "classifiers", []
        )
        own = given.get("output")
        for network in {network for network in networks if network.startswith("data/runs/gpu")} - {own}:
            assert place(written[network]) < place(name), f"{name} needs {network}"
            used.add(network)
        if name != "tables":
            assert given["dataset"] == (dataset or "cifar10")
    assert used | {"data/runs/gpu/adversarial"} == set(written), "nothing is trained in vain"
    with pytest.raises(ValueError, match=r"gpu\.yaml: no notebook of its steps has the parameter 'images'"):
        read_sweep(ROOT / "workflow" / "config" / "gpu.yaml", given={"images": "5"})


def test_small_configuration_has_the_keys_of_the_large_one():
    large, small = (
        yaml.safe_load((ROOT / "workflow" / "config" / f"{name}.yaml").read_text()) for name in ("mnist", "test")
    )
    assert large["parameters"].keys() == small["parameters"].keys()
    for name, step in small["steps"].items():
        assert step["notebook"] == large["steps"][name]["notebook"]
        assert step.get("after") == large["steps"][name].get("after")


def test_profiles(monkeypatch):
    assert read_profile("local")["executor"] == "local"
    assert read_profile("cuda")["config"] == {"device": "cuda", "notebooks_per_gpu": "1"}
    with pytest.raises(ValueError, match="profile 'cloud' is unknown; there is: cuda, local, slurm"):
        read_profile("cloud")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs Snakemake's engine for slurm, which is not installed"):
        read_profile("slurm")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match="needs slurm, which is not installed here: there is no sbatch"):
        read_profile("slurm")


def test_a_step_starts_without_what_takes_seconds():
    """Its notebook imports torch; the process that starts it needs neither that nor pandas."""
    code = "import sys, apudae.batch.step; assert not {'torch', 'pandas'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_command_refuses_with_status_2(repository):
    sound = written(repository, "sound", steps={"a": {"notebook": "01_rows"}})
    status, said = run(repository, sound, "--profile", "cloud")
    assert (status, said.count("\n")) == (2, 1)
    assert said.startswith("apudae: profile 'cloud' is unknown")
    status, said = run(repository, "missing.yaml")
    assert (status, said.count("\n")) == (2, 1)
    assert not (repository / "data" / "runs").exists()


# --- GPUs -------------------------------------------------------------------------------------------------------------


def test_gpus_are_handed_out_one_notebook_each(tmp_path, monkeypatch):
    monkeypatch.setattr(one_step, "RUNS", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    steps = {"steps": {"a": {"gpu": True}}}
    places = gpu_places(steps, {"executor": "local", "config": {}})
    assert places == ["2.0", "5.0"]
    with gpu_place(places) as first, gpu_place(places) as second:
        assert {first, second} == {"2", "5"}
        monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("a third notebook waits"))
        with pytest.raises(pytest.fail.Exception), gpu_place(places):
            pass
    shared = gpu_places(steps, {"executor": "local", "config": {"notebooks_per_gpu": "2"}})
    assert shared == ["2.0", "5.0", "2.1", "5.1"]
    with gpu_place(shared) as first, gpu_place(shared, 2) as both:
        assert (first, both) == ("2", "5,2"), "two different ones"
    with pytest.raises(ValueError, match="step a needs 3 GPUs; there are 2 here"):
        gpu_places({"steps": {"a": {"gpu": 3}}}, {"executor": "local", "config": {}})
    assert gpu_places(steps, {"executor": "slurm", "config": {}}) == []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="need a GPU, and there is none here: a"):
        gpu_places(steps, {"executor": "local", "config": {}})


# --- real graphs ------------------------------------------------------------------------------------------------------

GRAPH = {
    "make": {"notebook": "01_rows"},
    "use": {"notebook": "01_rows", "after": ["make"], "parameters": {"wait": 12.0, "purifier": "E"}},
    "read": {"notebook": "02_read", "after": ["results"]},
}


def graph(name):
    read = GRAPH["read"] | {"parameters": {"results": f"data/runs/{name}/results.csv"}}
    return GRAPH | {"read": read}


@pytest.fixture(scope="module")
def undisturbed(repository):
    """The folder of a sweep that ran from beginning to end, what it said, and its seconds."""
    begun = time.monotonic()
    status, said = run(repository, written(repository, "whole", steps=graph("whole")))
    assert status == 0, said
    return repository / "data" / "runs" / "whole", said, time.monotonic() - begun


def test_sweep_leaves_notebooks_pages_rows_and_tables(undisturbed):
    folder, said, _ = undisturbed
    assert "4 steps, 0 done, 4 to do" in said
    assert "no estimate" in said
    assert "4 of 4  finished read" in said
    files = {path.name for path in folder.iterdir()}
    for step in ("make", "use", "read"):
        assert {f"{step}.ipynb", f"{step}.html", f"{step}.benchmark.tsv", f"{step}.log"} <= files
    assert {"make.csv", "use.csv"} <= files
    assert not [name for name in files if "partial" in name or "failed" in name]
    assert pd.read_csv(folder / "results.csv").attack.tolist() == ["make", "use"]
    tables = pd.read_csv(folder / "tables.csv")
    assert tables.purifier.tolist() == ["A", "E"]
    assert not {"seconds", "device", "commit", "command"} & set(tables)


def test_report_is_a_folder_of_pages_that_opens_offline(repository, undisturbed):
    status, said = run(repository, "--results", "data/runs/whole/results.csv", command="report")
    assert status == 0, said
    folder = repository / "data" / "runs" / "report"
    assert os.path.relpath(folder / "index.html", repository) in said
    pages = {path.name for path in folder.iterdir()}
    assert {"index.html", "make.html", "use.html", "read.html", "results.csv", "tables.csv", "plotly.min.js"} <= pages
    index = (folder / "index.html").read_text()
    assert 'href="make.html"' in index
    assert "two rows" in index
    assert re.search(r"Commit [\w-]+; Python 3", index)
    assert "torch 2" in index
    assert 'src="plotly.min.js"' in (folder / "make.html").read_text()
    assert str(repository) not in index


def test_dry_run_says_what_a_change_makes_necessary_and_starts_nothing(repository, undisturbed):
    folder = undisturbed[0]
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*.ipynb")}
    status, said = run(repository, written(repository, "whole", steps=graph("whole")), "--dry-run")
    assert (status, "4 steps, 4 done, 0 to do" in said) == (0, True), said
    changed = graph("whole") | {"use": GRAPH["use"] | {"parameters": {"purifier": "F"}}}
    status, said = run(repository, written(repository, "whole", steps=changed), "--dry-run")
    assert (status, "4 steps, 1 done, 3 to do" in said) == (0, True), said
    assert "by earlier benchmarks of 2 of them\nuse\nresults\nread\n" in said
    assert {path: path.stat().st_mtime_ns for path in folder.glob("*.ipynb")} == before


def test_dry_run_estimates_by_committed_rows_what_never_ran_here(tmp_path, monkeypatch, capsys):
    facts = {"dataset": "mnist", "device": "cpu", "metric": "top-1", "notebook": "03_attacks", "n": 100}
    runs = [("attack", "one", 10.0), ("attack", "one", 20.0), ("worst_case", "one", 99.0), ("attack", "two", 60.0)]
    rows = [facts | {"kind": kind, "command": command, "seconds": seconds} for kind, command, seconds in runs]
    rows += [rows[0] | {"device": "a GPU", "seconds": 1.0}, rows[0] | {"metric": "top-5"}]
    pd.DataFrame(rows).to_csv(tmp_path / "rows.csv", index=False)
    monkeypatch.setattr(snakemake, "COMMITTED", tmp_path)
    known = {("03_attacks", "mnist", False): pytest.approx(0.45), ("03_attacks", "mnist", True): pytest.approx(0.01)}
    assert snakemake._seconds_of_rows() == known, "the median of .3 and .6"
    given = {"notebook": "03_attacks", "after": [], "parameters": {"dataset": "mnist", "n": 2000}, "gpu": 0}
    steps = {"a": given, "b": given | {"parameters": {"dataset": "cifar10", "n": 2000}}}
    snakemake._estimate({"steps": steps, "merged": []}, ["a", "b"], tmp_path, workers=2)
    assert capsys.readouterr().out == "about 15.0 minutes, by committed rows of 1 of them\n"


def test_failure_is_named_and_the_rest_goes_on(repository):
    steps = {
        "breaks": {"notebook": "01_rows", "parameters": {"fail": True}},
        "waits": {"notebook": "01_rows", "after": ["breaks"]},
        "stands": {"notebook": "01_rows"},
    }
    status, said = run(repository, written(repository, "broken", steps=steps))
    folder = repository / "data" / "runs" / "broken"
    assert status == 1
    assert "1 of 4 steps failed" in said
    assert "- breaks: 01_rows, cell 3: AssertionError: broken on purpose" in said  # 2 holds the parameters given
    assert str(folder / "breaks.failed.ipynb") in said
    assert "not run, as they come after: waits, results" in said
    assert (folder / "breaks.failed.ipynb").is_file()
    assert (folder / "stands.csv").is_file()
    assert not (folder / "breaks.csv").exists(), "nothing that looks finished"


def wait_for(condition, seconds=600):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
WRITERS = {"make": GRAPH["make"], "use": GRAPH["use"]}  # the same rows with less work


@linux
def test_disturbed_sweep_leaves_no_orphans_and_goes_on_to_the_same_tables(repository, undisturbed):
    """Disturbed twice while the second step runs: Ctrl-C, then kill -9 of the kernel."""
    config, folder = written(repository, "disturbed", steps=WRITERS), repository / "data" / "runs" / "disturbed"
    made = None
    for disturbance in (signal.SIGINT, None):
        with start(repository, config) as process:
            if disturbance:
                wait_for((folder / "steps.json").exists)
                refused, said = run(repository, config)
                assert (refused, said.count("\n")) == (2, 1), said
                assert "a sweep is running in" in said
            wait_for(lambda: (folder / "make.ipynb").exists() and kernels(repository))
            made = made or (folder / "make.ipynb").stat().st_mtime_ns
            if disturbance:
                process.send_signal(disturbance)
            else:
                os.kill(kernels(repository)[0], signal.SIGKILL)
            said, _ = process.communicate(timeout=1200)
            wait_for(lambda: not started(repository), 60)
        assert process.returncode == (1 if disturbance else 0), said
        assert ("goes on from here" in said) == bool(disturbance)
    assert "3 steps, 1 done, 2 to do" in said
    assert "failed use" in said
    assert "started use" in said.partition("failed use")[2], "tried once more"
    assert (folder / "make.ipynb").stat().st_mtime_ns == made
    assert (folder / "tables.csv").read_bytes() == (undisturbed[0] / "tables.csv").read_bytes()


@linux
def test_sweep_killed_five_times_at_random_moments_ends_in_the_same_tables(repository, undisturbed):
    quick = WRITERS | {"use": WRITERS["use"] | {"parameters": {"purifier": "E"}}}  # without the wait
    config, folder = written(repository, "killed", steps=quick), repository / "data" / "runs" / "killed"
    moments = random.Random()
    for _ in range(5):
        with start(repository, config) as process:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(moments.uniform(0, undisturbed[2] / 2))
            process.kill()
            process.communicate(timeout=600)
        wait_for(lambda: not started(repository), 60)
    status, said = run(repository, config)
    assert status == 0, said
    assert (folder / "tables.csv").read_bytes() == (undisturbed[0] / "tables.csv").read_bytes()


@linux
@pytest.mark.skipif(bool(slurm.missing()), reason=slurm.missing())
def test_slurm_gives_the_same_tables_and_tries_a_killed_job_again(repository, undisturbed):
    """A real Slurm: while the second step runs in its job, its process is killed on the node."""
    config, folder = written(repository, "slurm", steps=WRITERS), repository / "data" / "runs" / "slurm"
    with slurm.cluster(), start(repository, config, "--profile", "slurm") as process:
        try:
            wait_for(lambda: (folder / "make.ipynb").exists() and kernels(repository))
            (step,) = [pid for pid, line in started(repository).items() if "apudae.batch.step\0use" in line]
            assert "SLURM_JOB_ID=" in (Path("/proc") / str(step) / "environ").read_text()
            os.kill(step, signal.SIGKILL)
            said, _ = process.communicate(timeout=1200)
        finally:
            process.kill()
    assert process.returncode == 0, said
    assert "started use" in said.partition("failed use")[2], "tried once more"
    assert (folder / "tables.csv").read_bytes() == (undisturbed[0] / "tables.csv").read_bytes()
    wait_for(lambda: not started(repository), 60)


def kernels(repository):
    return [pid for pid, line in started(repository).items() if "ipykernel" in line]


# --- the whole of it, in small ----------------------------------------------------------------------------------------


def test_small_configuration_runs_from_nothing_to_the_report(tmp_path, monkeypatch):
    """Real notebooks and steps: workflow/config/test.yaml, then the report; minutes of two cores."""
    monkeypatch.setenv("PLOTLY_RENDERER", "plotly_mimetype")  # no PNG copies: pages show the interactive figures
    for folder in ("apudae", "workflow", "notebooks"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "data").mkdir()
    for folder in ("checkpoints", "results"):
        (tmp_path / "data" / folder).symlink_to(ROOT / "data" / folder)
    config, folder = tmp_path / "workflow" / "config" / "test.yaml", tmp_path / "data" / "runs" / "test"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    status, said = run(tmp_path, str(config))
    assert status == 0, said
    status, said = run(tmp_path, "--results", str(folder / "results.csv"), command="report")
    assert status == 0, said
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    steps = yaml.safe_load(config.read_text())["steps"]
    rows, tables = pd.read_csv(folder / "results.csv"), pd.read_csv(folder / "tables.csv")
    assert len(rows) == len(tables)
    assert {"test", "held_out"} == set(rows["split"])
    assert {"none", "direct", "A", "E"} == set(rows.purifier)
    assert {"clean", "pgd", "autoattack"} < set(rows.attack)
    index = (tmp_path / "data" / "runs" / "report" / "index.html").read_text()
    for step in steps:
        assert f'href="{step}.html"' in index
        assert (tmp_path / "data" / "runs" / "report" / f"{step}.html").stat().st_size > 10_000
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert seconds < 2 * 360, "under 6 minutes on two cores"
