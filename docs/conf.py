from __future__ import annotations

import sys
from pathlib import Path

import lightning_split

sys.path.insert(0, str(Path(__file__).parent))

project = "lightning_split"
author = "The lightning_split authors"
copyright = author
release = version = lightning_split.__version__

# No intersphinx: it reads other projects' indexes over the network, and the docs must build without one.
extensions = [
    "code_map",
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.doctest",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"lightning_split {release}"

myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
math_eqref_format = "Eq. ({number})"

autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False  # Lightning's own hook texts are not ours to repeat
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_google_docstring = True
napoleon_numpy_docstring = False

# Code blocks of the pages are run by `make docs` (directives testcode and testoutput), in a folder of their
# own, where Lightning may write. The docstrings' examples are run by pytest, not here.
doctest_test_doctest_blocks = ""
doctest_global_setup = """
import logging, os, tempfile, warnings
import torch
from torch import nn
warnings.simplefilter("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
torch.manual_seed(0)
_home, _scratch = os.getcwd(), tempfile.TemporaryDirectory()
os.chdir(_scratch.name)
"""
doctest_global_cleanup = """
os.chdir(_home)
_scratch.cleanup()
"""
