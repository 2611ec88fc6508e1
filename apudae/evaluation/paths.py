"""The ways that images go while they are purified, as data frames for figures and tables."""

import pandas as pd
from torch import Tensor, nn

from ..purification import Step
from .accuracy import accuracy


def errors_along(paths: dict[str, list[Step]]) -> pd.DataFrame:
    """The reconstruction error of each image at each step: columns images (the path's name), step, recon_error."""
    return pd.concat(
        pd.DataFrame({"images": name, "step": i, "recon_error": step.errors.cpu()})
        for name, path in paths.items()
        for i, step in enumerate(path)
    )


def quartiles(errors: pd.DataFrame) -> pd.DataFrame:
    """Median and quartiles at each step, for `plots.error_paths`."""
    found = errors.groupby(["images", "step"], sort=False).recon_error.quantile([0.25, 0.5, 0.75]).unstack()
    return found.set_axis(["low", "median", "high"], axis=1).reset_index()


def before_and_after(errors: pd.DataFrame, purifier: str) -> pd.DataFrame:
    """The errors before the first step and after the last, for `plots.error_histograms` (the paper's Figs. 3 and 4)."""
    return errors.assign(stage=errors.step.map({0: "before", errors.step.max(): f"after {purifier}"})).dropna()


def summary(ends: pd.DataFrame, recon_mu: float) -> pd.DataFrame:
    """Of `before_and_after`: the median error, and the share of images at or under μ."""
    groups = ends.assign(at_most_mu=ends.recon_error <= recon_mu).groupby(["stage", "images"], sort=False)
    return groups.agg(median=("recon_error", "median"), share_at_most_mu=("at_most_mu", "mean")).round(3)


def accuracy_along(classifier: nn.Module, paths: dict[str, list[Step]], y: Tensor) -> pd.DataFrame:
    """Accuracy after each step, for `plots.accuracy_curves`; columns images (the path's name), step, accuracy, …"""
    lines = []
    for name, path in paths.items():
        for i, step in enumerate(path):
            found = accuracy(classifier, step.images, y[: len(step.images)])
            low, high = found.interval
            lines.append({"images": name, "step": i, "accuracy": found.value, "ci_low": low, "ci_high": high})
    return pd.DataFrame(lines)
