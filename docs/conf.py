"""The site, from the same Markdown that reads well as it lies here: `make docs`, then docs/_build/html/index.html."""

from importlib import metadata

project = "Tunesmith"
release = version = metadata.version("tunesmith")
extensions = ["myst_parser"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"Tunesmith {release}"
html_static_path: list[str] = []
myst_heading_anchors = 3  # #a-heading leads to it, as on a forge
myst_links_external_new_tab = False
nitpicky = True
