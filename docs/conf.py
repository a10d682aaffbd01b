# SPDX-License-Identifier: Apache-2.0
"""The documentation as a site: `make docs` builds it into build/docs, with every warning an error.

Nothing is fetched, neither here nor by a reader's browser: fonts are the system's, scripts are the theme's own files.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "docs" / "_extensions")]

import mvit_kernels  # noqa: E402 (from this checkout, whatever is installed)

project = "mvit_kernels"
author = "The mvit_kernels authors"
project_copyright = "the mvit_kernels authors, Apache-2.0"
version = release = mvit_kernels.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
    "command_line",  # these four are in _extensions
    "docstrings",
    "layers",
    "repository",
]
exclude_patterns = ["_*"]
nitpicky = True
smartquotes_action = "D"  # dashes alone: quotes are to be copied

# -- Markdown ----------------------------------------------------------------------------------------------------------
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 4  # [text](page.md#a-heading), by the rule of code hosts
myst_fence_as_directive = ["mermaid"]

# -- API ---------------------------------------------------------------------------------------------------------------
default_role = (
    "name"  # `verify` in a docstring: a link if there is such an entry, else code (_extensions/docstrings.py)
)
add_module_names = False
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # shapes, dtypes and errors are in the text; with hints the signatures are unreadable
autoclass_content = "class"
napoleon_numpy_docstring = False
napoleon_include_init_with_doc = False
napoleon_use_rtype = False
napoleon_use_ivar = True
python_maximum_signature_line_length = 120

# -- HTML --------------------------------------------------------------------------------------------------------------
html_theme = "furo"
html_title = f"mvit_kernels {version}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
pygments_dark_style = "github-dark"
html_copy_source = False
html_show_sourcelink = False
html_use_index = True
copybutton_exclude = ".linenos, .gp, .go"
copybutton_prompt_text = ">>> |\\.\\.\\. |\\$ "
copybutton_prompt_is_regexp = True
