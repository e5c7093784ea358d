"""Writes a page of the API reference for every public module: all its public names, and the examples that use them."""

import ast
import importlib
import inspect
import re
from pathlib import Path
from typing import Any

# in the order of the page; what a later module repeats is a link to the first place
MODULES = (
    "mamba_attn",
    "mamba_attn.attribution",
    "mamba_attn.attribution.published",
    "mamba_attn.figures",
    "mamba_attn.models",
    "mamba_attn.models.vim",
    "mamba_attn.models.vmamba",
    "mamba_attn.explanations",
    "mamba_attn.analytics",
    "mamba_attn.evaluation",
    "mamba_attn.erf",
    "mamba_attn.findings",
    "mamba_attn.datasets",
    "mamba_attn.viewer",
    "mamba_attn.ops",
    "mamba_attn.orders",
    "mamba_attn.tracing",
    "mamba_attn.stand_ins",
    "mamba_attn.testing",
    "mamba_attn.images",
    "mamba_attn.errors",
)


def public_names(module: Any) -> list[str]:
    """Return what a module offers: ``__all__``, or else the functions and classes that it defines."""
    if hasattr(module, "__all__"):
        return [name for name in module.__all__ if not inspect.ismodule(getattr(module, name))]
    return [
        name
        for name, thing in vars(module).items()
        if not name.startswith("_") and callable(thing) and getattr(thing, "__module__", "") == module.__name__
    ]


def pages() -> dict[str, str]:
    """Return the reStructuredText of every page, by its name."""
    home: dict[int, str] = {}
    written = {}
    for name in MODULES:
        module = importlib.import_module(name)
        title = f"``{name}``"
        lines = [title, "=" * len(title), "", f".. py:module:: {name}", "", inspect.getdoc(module) or "", ""]
        linked = []
        for each in public_names(module):
            thing = getattr(module, each)
            if not callable(thing):
                lines += [f".. py:data:: {name}.{each}", "   :no-index:", "", *_comment(module, each), ""]
                continue
            if id(thing) in home:
                linked.append(f":py:obj:`{home[id(thing)]}`")
                continue
            home[id(thing)] = full = f"{name}.{each}"
            kind = "autoclass" if inspect.isclass(thing) else "autofunction"
            lines += [each, "-" * len(each), "", f".. {kind}:: {full}"]
            lines += ["   :members:", "   :show-inheritance:"] if kind == "autoclass" else []
            lines += ["", f".. minigallery:: {full}", "   :add-heading: Examples using it", "   :heading-level: ~", ""]
        if linked:
            lines += ["Also here", "---------", "", ", ".join(linked), ""]
        written[name] = "\n".join(lines)
    listed = "\n".join(f"   {name}" for name in MODULES)
    written["index"] = (
        f"API reference\n=============\n\n.. include:: ../_ext/api.txt\n\n.. toctree::\n   :maxdepth: 1\n\n{listed}\n"
    )
    return written


def _comment(module: Any, name: str) -> list[str]:
    """What the source says of a constant: the comment above its assignment."""
    source = inspect.getsource(module).splitlines()
    for node in ast.parse("\n".join(source)).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            above = source[node.lineno - 2].strip()
            return [f"   {above.lstrip('# ')}"] if above.startswith("#") else []
    return []


def write(app: Any) -> None:
    """Write the pages that changed."""
    folder = Path(app.srcdir) / "api"
    folder.mkdir(exist_ok=True)
    for name, text in pages().items():
        path = folder / f"{name}.rst"
        if not path.exists() or path.read_text() != text:
            path.write_text(text)


def escaped(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Escape what reStructuredText would take for markup: docstrings here use double backticks alone."""
    literal = code = False
    for number, line in enumerate(lines):
        code = line.lstrip().startswith(">>>") or (code and bool(line.strip()))
        if code:
            continue
        parts = re.split("(``)", line)
        for at, part in enumerate(parts):
            literal ^= part == "``"
            if not literal and part != "``":
                parts[at] = re.sub(r"([*|])", r"\\\1", part)
        lines[number] = "".join(parts)


def setup(app: Any) -> dict[str, bool]:
    """Sphinx calls this."""
    app.connect("builder-inited", write)
    app.connect("autodoc-process-docstring", escaped, priority=400)  # before napoleon
    return {"parallel_read_safe": True}
