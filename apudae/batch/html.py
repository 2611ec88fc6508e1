"""An executed notebook as one HTML page that needs no network."""

import json
from html import escape
from typing import Any

import nbformat
import plotly.io as pio
from latex2mathml.converter import convert as mathml
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath

PLOTLY = "application/vnd.plotly.v1+json"
# on a phone, what is wide scrolls by itself, and a table's rows keep their names
NARROW = """<style>.jp-OutputArea-output, .formula {overflow-x: auto} .formula {display: block}
.jp-RenderedText pre {white-space: pre} .dataframe tbody th {position: sticky; left: 0; background: white}</style>"""
# nbconvert's page without its scripts, which a network would have to bring
SCRIPTS = ("requirejs", "mathjax", "mermaidjs")
PAGE = "{% extends 'lab/index.html.j2' %}" + "".join(f"{{% block html_head_js_{x} %}}{{% endblock %}}" for x in SCRIPTS)


class _Formulas(IPythonRenderer):
    """Markdown whose formulas become MathML, which browsers draw themselves."""

    def block_math(self, body: str) -> str:
        return f'<span class="formula">{mathml(body, display="block")}</span>'

    def inline_math(self, body: str) -> str:
        return mathml(body)


def page(notebook: nbformat.NotebookNode, library: bool | str = True, **options: Any) -> str:
    """The notebook as one HTML page that needs no network; its figures stay interactive.

    `library`: Plotly inside the page (True), or "directory", in plotly.min.js beside it, which many pages can share.
    """
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if PLOTLY in output.get("data", {}):
                drawn = pio.from_json(json.dumps(output.data[PLOTLY]), skip_invalid=True)
                output.data = {"text/html": pio.to_html(drawn, include_plotlyjs=library, full_html=False)}
                library = False
    notebook.metadata["title"] = escape(notebook.cells[0].source.partition("\n")[0].lstrip("# "))
    exporter = HTMLExporter(raw_template=PAGE, **options)
    exporter.register_filter("markdown2html", MarkdownWithMath(renderer=_Formulas(escape=False)).render)
    return exporter.from_notebook_node(notebook)[0].replace("</head>", f"{NARROW}\n</head>", 1)
