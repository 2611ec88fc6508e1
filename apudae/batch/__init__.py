"""The command line and everything that runs notebooks in bulk."""


class NotebookError(RuntimeError):
    """A cell of a notebook failed."""
