"""The command line and everything that runs notebooks in bulk."""

RESULTS = "results"  # the step of a sweep that merges the rows


class NotebookError(RuntimeError):
    """A cell of a notebook failed."""
