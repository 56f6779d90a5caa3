"""Sphinx's settings for the site. Nothing here asks another host for anything: mathematics and scripts are local."""

from docutils import nodes
from latex2mathml.converter import convert

project = "quantlab"
author = "the authors of quantlab"
copyright = "the authors of quantlab, Apache-2.0"
extensions = ["myst_nb"]
nb_execution_mode = "off"  # pages show what recipes/notebooks.py stored
nb_ipywidgets_js = {}  # else a script of another host
nb_merge_streams = True
myst_enable_extensions = ["dollarmath", "fieldlist"]
myst_dmath_double_inline = True
myst_heading_anchors = 3
html_theme = "furo"
html_title = "quantlab"
html_favicon = "_static/icon.svg"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_js_files = ["film.js", "table.js"]
html_copy_source = False
html_show_sphinx = False
html_math_renderer = "mathml"
language = "en"
suppress_warnings = ["myst.header", "misc.highlighting_failure"]  # notebooks begin sections as they like


def inline(self, node: nodes.math) -> None:
    self.body.append(convert(node.astext()))
    raise nodes.SkipNode


def block(self, node: nodes.math_block) -> None:
    self.body.append(f'<div class="math-block" tabindex="0">{convert(node.astext(), display="block")}</div>')
    raise nodes.SkipNode


def level_of_captions(_app, _page, _template, context: dict, _doctree) -> None:
    """Sphinx calls the captions of the list of chapters headings, and leaves out their level."""
    for part in ("body", "furo_navigation_tree"):
        if part in context:
            context[part] = str(context[part]).replace('role="heading">', 'role="heading" aria-level="2">')


def setup(app) -> None:
    app.connect("html-page-context", level_of_captions, priority=900)  # after the theme
    app.add_html_math_renderer("mathml", inline_renderers=(inline, None), block_renderers=(block, None))
