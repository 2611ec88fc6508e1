"""Plotly figures from data frames and images. Nothing is computed here."""

import base64
import io
import os
import shutil
import sys
import textwrap
import warnings

import numpy as np
import pandas as pd
import plotly.express as px
import plotly.graph_objects as go
import plotly.io as pio
from PIL import Image
from plotly.subplots import make_subplots
from torch import Tensor

# Okabe and Ito (2008): told apart by readers with any kind of colour vision
PALETTE = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000", "#999999"]
WIDTH = 820  # of a figure at most, in pixels: what a cell of JupyterLab and a page of GitHub show
BARS = {"error_y": "above", "error_y_minus": "below"}  # columns that `_with_bars` adds
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def setup() -> None:
    """Show figures as interactive Plotly and, where a browser can draw it, as PNG too (for GitHub's static view)."""
    if "PLOTLY_RENDERER" not in os.environ:
        drawable = _drawable()
        pio.renderers.default = "plotly_mimetype+png" if drawable else "plotly_mimetype"
        if not drawable:
            print("No Chromium: figures are interactive only (harmless)", file=sys.stderr)
    warnings.formatwarning = lambda message, category, *_: f"{category.__name__}: {message}\n"  # one line, no paths
    template = pio.templates["plotly_white"]
    template.layout.colorway = PALETTE
    template.layout.margin = {"l": 60, "r": 20, "t": 60, "b": 50}
    template.layout.update(width=WIDTH, height=420, title_font_size=16)
    pio.templates["apudae"] = template
    pio.templates.default = "apudae"


def _drawable() -> bool:
    """Whether there is a browser that draws: one figure is tried, as a program of that name may be none."""
    if not (any(map(shutil.which, BROWSERS)) or "BROWSER_PATH" in os.environ):
        return False
    try:
        return bool(go.Figure().to_image("png", width=10, height=10))
    except Exception:  # whatever the browser's bridge raises: the figures are interactive then
        return False


def image_strip(columns: dict[str, Tensor], captions: dict[str, list[str]], title: str) -> go.Figure:
    """Rows of images: `columns` maps a heading to images (n, C, H, W) in [0, 1], `captions` to a text under each."""
    rows = len(next(iter(columns.values())))
    cell = min(110, (WIDTH - 90) / len(columns))
    wrap = textwrap.TextWrapper(int(cell / 8), break_long_words=False).wrap
    wrapped = [wrap(heading.replace("<br>", " ")) for heading in columns]
    headings = ["<br>".join(each) for each in wrapped]
    longest = max((len(line) for each in wrapped for line in each), default=1)
    gap = {"horizontal_spacing": 0.01, "vertical_spacing": 0.22 / rows}
    figure = make_subplots(rows, len(columns), column_titles=headings, **gap)
    # letters are .6 of their size wide at most, and read from 6 on
    figure.update_annotations(font_size=max(6, min(16, cell / (0.6 * longest))))
    for column, (heading, images) in enumerate(columns.items(), start=1):
        for row, image in enumerate(images, start=1):
            figure.add_trace(go.Image(source=encoded(image), hoverinfo="skip"), row, column)
            text = captions.get(heading, [""] * rows)[row - 1]
            figure.update_xaxes(title={"text": text, "standoff": 2, "font_size": 13}, row=row, col=column)
    figure.update_xaxes(showticklabels=False, showgrid=False, zeroline=False)
    figure.update_yaxes(showticklabels=False, showgrid=False, zeroline=False)
    lines = max(heading.count("<br>") for heading in headings)
    height = (cell + 20) * rows + 130 + 20 * lines
    return figure.update_layout(title=title, width=cell * len(columns) + 90, height=height, margin_t=80 + 20 * lines)


def encoded(image: Tensor) -> str:
    """An image (C, H, W) in [0, 1] as a data URL of a picture, a digit enlarged."""
    bytes_ = (image.detach().cpu().clamp(0, 1) * 255).round().byte().movedim(0, -1).numpy()
    picture = Image.fromarray(np.repeat(bytes_, 3, 2) if bytes_.shape[2] == 1 else bytes_)
    factor = max(1, 112 // picture.height)  # digits are drawn larger, each pixel as a square
    picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    buffer, kind = io.BytesIO(), "PNG" if picture.height <= 128 else "JPEG"  # photographs would fill the notebook
    picture.save(buffer, kind, **({"quality": 80} if kind == "JPEG" else {}))
    return f"data:image/{kind.lower()};base64," + base64.b64encode(buffer.getvalue()).decode()


def _with_bars(rows: pd.DataFrame, value: str = "accuracy", low: str = "ci_low", high: str = "ci_high") -> pd.DataFrame:
    return rows.assign(above=rows[high] - rows[value], below=rows[value] - rows[low])


def accuracy_bars(rows: pd.DataFrame, title: str) -> go.Figure:
    """Grouped bars: accuracy for each attack, one colour a purifier, with 95 % intervals.

    `rows` has the columns attack, purifier, accuracy, ci_low, ci_high of `data/results/*.csv`.
    """
    drawn = _with_bars(rows)
    figure = px.bar(drawn, x="attack", y="accuracy", color="purifier", barmode="group", **BARS)
    figure.update_yaxes(title="accuracy (share of images), 95 % interval", range=[0, 1.02])
    return figure.update_xaxes(title="attack").update_layout(title=title, legend_title="purifier")


def accuracy_curves(
    rows: pd.DataFrame, x: str, colour: str, title: str, x_title: str, panel: str | None = None
) -> go.Figure:
    """Accuracy against the column `x`, one line for each value of the column `colour`, with 95 % intervals.

    With the column `panel`, a panel with an x axis of its own for each of its values, two in a row.
    """
    drawn = _with_bars(rows)
    marks = {"color": colour, "symbol": colour, "markers": True, "facet_col": panel, "facet_col_wrap": 2}
    figure = px.line(drawn, x=x, y="accuracy", **BARS, **marks, facet_row_spacing=0.12)
    names = list(dict.fromkeys(trace.name for trace in figure.data))
    for trace in figure.data:  # a colour that comes again is dashed
        trace.line.dash = "dash" if names.index(trace.name) >= len(PALETTE) else None
    rows = 1 if panel is None else -(-drawn[panel].nunique() // 2)
    figure.for_each_annotation(lambda note: note.update(text=note.text.removeprefix(f"{panel}="), font_size=11))
    figure.update_yaxes(range=[0, 1.02]).update_yaxes(title="accuracy, 95 % interval", col=1)
    figure.update_layout(height=420 if rows == 1 else 140 + 280 * rows)
    figure.update_xaxes(showticklabels=True)
    return figure.update_xaxes(title=x_title, matches=None).update_layout(title=title)


def accuracy_cost(rows: pd.DataFrame, title: str) -> go.Figure:
    """Accuracy against the column milliseconds (of an image), a point for each purifier, with 95 % intervals."""
    drawn = _with_bars(rows)
    figure = px.scatter(drawn, x="milliseconds", y="accuracy", color="purifier", symbol="purifier", **BARS)
    figure.update_traces(marker_size=10).update_xaxes(type="log", title="milliseconds an image", exponentformat="power")
    figure.update_yaxes(title="accuracy (share of images), 95 % interval", range=[0, 1.02])
    return figure.update_layout(title=title, legend_title="defense")


def error_paths(rows: pd.DataFrame, title: str, recon_mu: float) -> go.Figure:
    """Reconstruction error against the iteration: median and quartiles, one colour for each kind of images.

    `rows` has the columns images, step, median, low, high.
    """
    drawn = _with_bars(rows, "median", "low", "high")
    figure = px.line(drawn, x="step", y="median", color="images", symbol="images", markers=True, **BARS)
    figure.add_hline(y=recon_mu, line_dash="dot", annotation_text="μ", annotation_position="bottom right")
    figure.update_yaxes(title="reconstruction error, median and quartiles", rangemode="tozero")
    return figure.update_xaxes(title="iteration i").update_layout(title=title)


def margin_paths(rows: pd.DataFrame, title: str) -> go.Figure:
    """Margin against the step of an attack, one colour a surrogate; `rows` has the columns surrogate, step, margin."""
    figure = px.line(rows, x="step", y="margin", color="surrogate", symbol="surrogate", markers=True)
    figure.add_hline(y=0, line_dash="dot", annotation_text="misread below", annotation_position="bottom right")
    figure.update_yaxes(title="mean margin of the defense, in logits").update_xaxes(title="step of the attack")
    return figure.update_layout(title=title)


def error_histograms(rows: pd.DataFrame, title: str, recon_mu: float, mark: str = "μ") -> go.Figure:
    """Histograms of reconstruction error; `rows` has the columns recon_error, images (colour) and stage (panel).

    A line at `recon_mu`, or at another error that `mark` names.
    """
    figure = px.histogram(
        rows, x="recon_error", color="images", facet_row="stage", barmode="overlay", opacity=0.65, nbins=80
    )
    figure.add_vline(x=recon_mu, line_dash="dot", annotation_text=mark)
    figure.for_each_annotation(lambda note: note.update(text=note.text.removeprefix("stage=")))
    figure.update_xaxes(title="reconstruction error (sum of squares over an image)", row=1)
    return figure.update_yaxes(title="images").update_layout(title=title, height=520)


def training_curve(
    curve: list[dict[str, float]], title: str, y_title: str, reference: float | None = None
) -> go.Figure:
    """Mean loss against step, on a logarithmic scale; `reference` is drawn as the loss of doing nothing."""
    figure = px.line(pd.DataFrame(curve), x="step", y="loss", log_y=True)
    if reference is not None:
        figure.add_hline(y=reference, line_dash="dot")
        label = {"text": f"the identity: {reference:.4f}", "showarrow": False, "yshift": 10}
        figure.add_annotation(x=1, xref="paper", xanchor="right", y=float(np.log10(reference)), **label)
    return figure.update_yaxes(title=y_title).update_xaxes(title="step (batches)").update_layout(title=title)
