"""How Sphinx builds the documentation: without the network, and with a broken reference being an error."""

from __future__ import annotations

import sys
from importlib.metadata import version as version_of
from typing import TYPE_CHECKING

import stageflow

if TYPE_CHECKING:
    from docutils.nodes import Element, reference
    from sphinx.addnodes import pending_xref
    from sphinx.application import Sphinx
    from sphinx.environment import BuildEnvironment

project = "stageflow"
author = "The stageflow authors"
copyright = author  # noqa: A001
version = release = version_of("stageflow")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"stageflow {version}"
myst_heading_anchors = 3

default_role = "code"  # `this`, in a docstring
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
napoleon_use_ivar = True  # "Attributes:" next to properties of the same name must not document them twice

# Nothing outside of stageflow is looked up (that would take the network), so no reference to it can be resolved.
EXTERNAL = "|".join([*sys.stdlib_module_names, "attr", "attrs", "cattrs", "rich", "trio"])
TYPE_VARIABLE = r"(.*\.)?_?[A-Z](_co|_contra)?"
# What stands in signatures without being a public name; the reference says in words what is meant.
UNNAMED = (
    r"(stageflow\..*\.)?"
    r"(Action|Body|Call|Condition|Default|Dependency|Details|NativeBody|PlainBody|Probe|Proceed|Runner|Shape|StageFunction"
    r"|Step|Undo)"
    r"|Abstract(Async)?ContextManager|AttrsInstance"
)
nitpick_ignore_regex = [(r"py:.*", rf"({EXTERNAL})(\..*)?"), (r"py:.*", TYPE_VARIABLE), (r"py:.*", UNNAMED)]


def find_public_name(app: Sphinx, env: BuildEnvironment, node: pending_xref, text: Element) -> reference | None:
    """Resolve `stageflow.engine.run.Run` as `stageflow.Run`: where a user gets it from, not where it lives."""
    parts = node["reftarget"].split(".") if node.get("refdomain") == "py" else []
    for i, part in enumerate(parts):
        if part in stageflow.__all__:
            target = ".".join(["stageflow", *parts[i:]])
            found = env.domains["py"].resolve_xref(env, node["refdoc"], app.builder, "obj", target, node, text)
            if found is not None:
                return found
    return None


def setup(app: Sphinx) -> None:
    """Let Sphinx ask us about references it cannot resolve."""
    app.connect("missing-reference", find_public_name)
