"""Settings of the site. Build it with ``python docs/build.py``, which needs the extra ``docs`` and no network."""

import sys
import tomllib
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent
sys.path[:0] = [str(HERE / "_ext"), str(ROOT)]

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
project = "mamba_attn"
author = "The mamba_attn developers"
release = version = PROJECT["version"]

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "myst_parser",
    "sphinx_design",
    "sphinx_copybutton",
    "sphinx_gallery.gen_gallery",
    "api_pages",
    "outside_links",
    "offline_figures",
    "live_pages",
]
exclude_patterns = ["_build", "_ext", "examples", "build.py", "conf.py"]
repository = PROJECT.get("urls", {}).get("Repository", "")  # links to files outside docs/ lead there, if it is set

myst_heading_anchors = 3

autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
python_maximum_signature_line_length = 88
# types in annotations, and errors of others: torch, numpy and plotly have sites of their own, which a build without a
# network cannot ask; every other reference must lead somewhere
nitpick_ignore_regex = [(r"py:(class|exc)", r".*")]

html_theme = "pydata_sphinx_theme"
html_title = "mamba_attn"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_js_files = ["filter.js"]
html_show_sourcelink = False
html_theme_options = {
    "navbar_align": "left",
    "header_links_before_dropdown": 9,
    "show_prev_next": False,
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": ["copyright"],
    "footer_end": [],
    "pygments_light_style": "default",
    "pygments_dark_style": "monokai",
}
copyright = "the mamba_attn developers, Apache-2.0"
html_sidebars = {"quickstart": [], "index": [], "live": []}
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

sphinx_gallery_conf = {
    "examples_dirs": "examples",
    "gallery_dirs": "gallery",
    "filename_pattern": r"\.py$",
    "backreferences_dir": "gallery/backreferences",
    "doc_module": ("mamba_attn",),
    "image_scrapers": ("offline_figures.scraper",),
    "capture_repr": (),  # the scraper shows figures; everything else is printed
    "download_all_examples": False,
    "show_memory": False,
    "show_signature": False,
    "min_reported_time": 0,
    "remove_config_comments": True,
    "nested_sections": False,
    "within_subsection_order": "FileNameSortKey",
}
# without a browser, thumbnails are placeholders; the pages are whole
suppress_warnings = ["plotly.sg_scraper", "plotly.sg_scraper_fallback", "config.cache"]
