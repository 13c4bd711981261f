"""The site: these pages and the docstrings, by Sphinx.

pip install -e '.[docs]' && sphinx-build -W --keep-going docs build/docs
"""

import importlib
import pkgutil
import re

from sphinx.ext import napoleon

from gla_jax.config import describe

project = html_title = "gla-jax"
html_theme = "furo"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.viewcode"]

myst_heading_anchors = 3
highlight_language = "none"  # of blocks that name no language
default_role = "code"  # docstrings write `names` as Markdown does

autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_mock_imports = ["lm_eval", "tqdm"]  # of the extra `eval`
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 100


def fill_in(app, docname, source):
    """Put into pages what the code has today: every field of a config, the modules of a package."""

    def modules(match):
        package = importlib.import_module(match[1])
        page = f"```{{eval-rst}}\n.. automodule:: {match[1]}\n   :no-members:\n```"
        for name in sorted(module.name for module in pkgutil.iter_modules(package.__path__, f"{match[1]}.")):
            page += f"\n\n## {name}\n\n```{{eval-rst}}\n.. automodule:: {name}\n```"
        return page

    text = source[0].replace("<!-- every field of a config -->", f"```none\n{describe()}\n```")
    source[0] = re.sub(r"<!-- every module of ([\w.]+) -->", modules, text)


def read_as_written(app, what, name, obj, options, lines):
    """Have docstrings mean to Sphinx what they mean to a reader: indented blocks are formulas, commands and tables."""
    indent = lambda line: len(line) - len(line.lstrip())
    new: list[str] = []
    for line in lines:
        above = next((indent(earlier) for earlier in reversed(new) if earlier.strip()), None)
        if line.strip() and above is not None and not new[-1].strip() and indent(line) >= above + 4:
            new += [" " * above + "::", ""]
        new.append(re.sub(r"(`[^`]+`)(\w)", r"\1\\ \2", line))  # plurals of names, as in `Array`s
    # Of a field, napoleon would take whatever stands before a colon for a type.
    if what not in ("attribute", "data"):
        google = napoleon.Config(napoleon_use_rtype=False)
        new = napoleon.GoogleDocstring(new, google, app, what, name, obj, options).lines()
    lines[:] = new


def setup(app):
    """Connect the above."""
    app.connect("source-read", fill_in)
    app.connect("autodoc-process-docstring", read_as_written)
