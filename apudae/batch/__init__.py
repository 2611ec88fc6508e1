"""The command line and everything that runs notebooks in bulk."""

import sys

RESULTS = "results"  # the step of a sweep that merges the rows
# jsonschema, which nbformat needs, would compile a grammar of web addresses at its import, which takes two thirds of a
# step's start; it does without the package where that cannot be imported, and no schema here has such a format
sys.modules.setdefault("rfc3987_syntax", None)


class NotebookError(RuntimeError):
    """A cell of a notebook failed."""
