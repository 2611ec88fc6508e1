"""The command line `apudae`."""

import os
import sys
import textwrap
from pathlib import Path

import click

from ..files import RESULTS
from . import NotebookError
from .parameters import (
    NOTEBOOKS,
    check_parameters,
    declared_parameters,
    from_here,
    notebook_names,
    question,
    read_mapping,
)

# what a command needs beside these is imported in it: papermill, nbconvert and torch take seconds


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def cli() -> None:
    """Adversarial purification with denoising autoencoders: run and list the notebooks."""


@cli.command()
@click.argument("notebook")
@click.option("-p", "pairs", nargs=2, multiple=True, metavar="NAME VALUE", help="Set one parameter.")
@click.option("-f", "file", type=click.Path(dir_okay=False, path_type=Path), help="Set parameters from a YAML file.")
def run(notebook: str, pairs: tuple[tuple[str, str], ...], file: Path | None) -> None:
    """Execute NOTEBOOK (its name, such as 00_quickstart) into data/runs/."""
    name, given = Path(notebook).stem, (read_mapping(file) if file else {}) | dict(pairs)
    given = from_here(check_parameters(name, given))  # a wrong one is told before anything is loaded

    from .notebooks import run_notebook, tagged_text

    target = run_notebook(name, given)
    if table := tagged_text(target, "result"):
        click.echo(f"\n{table}\n")
    click.echo(f"executed notebook  {os.path.relpath(target)}")
    click.echo(f"open in a browser  {os.path.relpath(target.with_suffix('.html'))}")


@cli.command()
@click.argument("config", type=click.Path(path_type=Path))
@click.option("-p", "pairs", nargs=2, multiple=True, metavar="NAME VALUE", help="Set one general parameter.")
@click.option("--profile", default="local", show_default=True, help="Where: a folder of workflow/profiles/.")
@click.option("--dry-run", is_flag=True, help="Say what would run, and about how long, and stop.")
def sweep(config: Path, pairs: tuple[tuple[str, str], ...], profile: str, dry_run: bool) -> None:
    """Run the graph of notebooks of the sweep file CONFIG (workflow/config/mnist.yaml), as far as it is not done."""
    from .snakemake import run_sweep

    run_sweep(config, profile, dry_run, dict(pairs))


@cli.command()
@click.option("--results", type=click.Path(path_type=Path), default=RESULTS / "mnist.csv", help="CSV file of the rows.")
def report(results: Path) -> None:
    """Collect result tables and executed notebooks into a folder of HTML pages that open without a network."""
    from .report import write_report

    click.echo(f"open in a browser  {os.path.relpath(write_report(results))}")


@cli.command()
def notebooks() -> None:
    """List the notebooks with their question and parameters."""
    for name in notebook_names():
        click.secho(name, bold=True)
        asked = question(NOTEBOOKS / f"{name}.ipynb")
        click.echo(textwrap.fill(asked, 100, initial_indent="  ", subsequent_indent="  "))
        for key, (default, comment) in declared_parameters(name).items():
            click.echo(f"    {key} = {default!r}  {comment}")


def main() -> None:
    """Entry point: bad input is one line and exit status 2, a failed notebook one message and exit status 1."""
    try:
        cli()
    except (ValueError, OSError, NotebookError) as error:  # OSError: a full disk, …, in the system's words
        click.echo(f"apudae: {error}", err=True)
        sys.exit(1 if isinstance(error, NotebookError) else 2)
