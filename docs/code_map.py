"""The directive ``modules``: the first lines of modules' docstrings, and a warning for each left out."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.parsers.rst import Directive
from sphinx.application import Sphinx
from sphinx.util import logging

PACKAGE = Path(__file__).parents[1] / "lightning_split"
_log = logging.getLogger(__name__)
_listed: set[str] = set()


def first_line(path: Path) -> str:
    """The summary of a module's docstring."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return " ".join(text.split("\n\n")[0].split())


class Modules(Directive):
    """A list of the modules named in the content, as paths without ``.py``; a folder is all its files."""

    has_content = True

    def run(self) -> list[nodes.Node]:
        """The list."""
        names = [name for line in self.content for name in line.split()]
        items = nodes.definition_list()
        for name in names:
            path = PACKAGE / name
            files = sorted(path.glob("*.py")) if path.is_dir() else [path.with_suffix(".py")]
            for file in files:
                _listed.add(file.relative_to(PACKAGE).as_posix())
                shown = file.relative_to(PACKAGE).as_posix().removesuffix("/__init__.py")
                term = nodes.term("", "", nodes.literal(text=shown))
                text = nodes.paragraph(text=first_line(file).replace("``", ""))
                items += nodes.definition_list_item("", term, nodes.definition("", text))
        return [items]


def _complete(app: Sphinx, env: Any) -> None:
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        if name not in _listed | {"__init__.py"}:
            _log.warning("docs/code.md does not list %s", name)


def setup(app: Sphinx) -> dict[str, Any]:
    """Called by Sphinx."""
    app.add_directive("modules", Modules)
    app.connect("env-check-consistency", _complete)
    return {"parallel_read_safe": False}
