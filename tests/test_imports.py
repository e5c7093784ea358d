"""Who imports whom: each room only rooms below it, and the core nothing but torch, numpy, einops and jaxtyping."""

import ast
import json
import os
import subprocess
import sys
from importlib.metadata import distribution, packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent

# from the roof to the cellar; names on one line are one room
HOUSE = [
    ["commands"],
    ["viewer"],
    ["findings"],
    ["analytics", "erf", "evaluation", "explanations", "distributed"],
    ["datasets"],
    ["attribution", "testing"],
    ["stand_ins", "integrations"],
    ["tracing"],  # reaches integrations by name only
    ["models"],
    ["ops"],
    ["core"],
    ["images", "orders"],
    ["figures", "errors", "_types"],
]
FLOOR = {name: depth for depth, names in enumerate(HOUSE) for name in names}
ANY_ROOM = ("__init__", "__main__")  # the front doors
CORE = [f"mamba_attn.{name}" for name in ("models", "ops", "tracing", "core", "orders")]
HEAVY = ("timm", "torchvision", "captum", "plotly", "PIL", "rich", "safetensors", "sklearn", "umap", "zarr",
         "starlette", "uvicorn")  # fmt: skip


def modules():
    """(dotted name, path) of every file of the library."""
    for folder in ("mamba_attn", "integrations"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = list(path.relative_to(ROOT).with_suffix("").parts)
            yield ".".join(["mamba_attn", *parts] if folder == "integrations" else parts), path


MODULES = dict(modules())


def room(module):
    """The room of a dotted name: what stands after ``mamba_attn.``."""
    return module.split(".")[1] if "." in module else "__init__"


def imports(source, module):
    """Dotted names of our own that a source imports anywhere in it, functions and TYPE_CHECKING blocks included."""
    package = module.removesuffix(".__init__") if module.endswith("__init__") else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package.split(".")[: len(package.split(".")) + 1 - node.level]) if node.level else ""
            base = ".".join(part for part in (base, node.module) if part)
            # from mamba_attn import ops names a room, from mamba_attn.ops import hidden_attention a thing in one
            names = [f"{base}.{alias.name}" if base == "mamba_attn" else base for alias in node.names]
        for name in names:
            top = name.split(".")[0]
            if top in ("mamba_attn", "integrations", "cuda"):
                yield name if top == "mamba_attn" else f"mamba_attn.{name}"


def violation(importer, imported):
    """The rule that an import breaks, or None."""
    here, there = room(importer), room(imported)
    if there == "integrations" and here != "integrations":
        return "integrations are found by name, never imported"
    if here in ANY_ROOM or here == there or (here == "commands" and there in ANY_ROOM):  # the roof has the door's name
        return None
    if there not in FLOOR:
        return f"{imported} is no room; import the room that it comes from"
    if here == "figures":
        return "figures import nothing of ours"
    if FLOOR[here] > FLOOR[there]:
        return f"{here} stands below {there}"
    return None


@pytest.mark.parametrize("module", MODULES)
def test_every_file_has_a_room_and_imports_only_rooms_below(module):
    assert room(module) in FLOOR or room(module) in ANY_ROOM, f"{module}: which room? add it to HOUSE"
    found = [(name, violation(module, name)) for name in imports(MODULES[module].read_text(), module)]
    assert [f"{module} imports {name}: {rule}" for name, rule in found if rule] == []


@pytest.mark.parametrize(
    ("module", "source", "broken"),
    [
        ("mamba_attn.ops.x", "from mamba_attn.core.scan_record import ScanRecord", None),
        ("mamba_attn.ops.x", "from . import reference", None),
        ("mamba_attn.ops.x", "from ..models import vim", "ops stands below models"),
        ("mamba_attn.ops.x", "def f():\n    from mamba_attn import models", "ops stands below models"),
        ("mamba_attn.core.scan_record", "import mamba_attn.ops.reference", "core stands below ops"),
        ("mamba_attn.core.scan_record", "from mamba_attn.core.layout import TokenLayout", None),
        ("mamba_attn.core.scan_record", "from mamba_attn import ScanRecord", "mamba_attn.ScanRecord is no room"),
        ("mamba_attn.attribution.x", "import mamba_attn.integrations.vim", "found by name"),
        ("mamba_attn.tracing.adapters", "from mamba_attn.integrations import vim", "found by name"),
        ("mamba_attn.tracing.adapters", "import integrations", "found by name"),
        (
            "mamba_attn.figures.x",
            "from mamba_attn.core.scan_record import ScanRecord",
            "figures import nothing of ours",
        ),
        ("mamba_attn.figures.x", "from mamba_attn.figures.theme import INK", None),
        ("mamba_attn.integrations.vim", "from mamba_attn.tracing.adapters import Adapter", None),
        (
            "mamba_attn.integrations.vim",
            "from mamba_attn.attribution import RawAttention",
            "integrations stands below attribution",
        ),
        ("mamba_attn.__init__", "from mamba_attn.tracing.tracer import trace", None),
        ("mamba_attn.commands.cli", "import mamba_attn", None),
        ("mamba_attn.viewer.x", "import mamba_attn", "mamba_attn is no room"),
        ("mamba_attn.ops.x", "import torch", None),
    ],
)
def test_the_rule_itself(module, source, broken):
    found = [violation(module, name) for name in imports(source, module)]
    assert (found == [] or found == [None]) if broken is None else broken in found[0]


def run(code, *arguments):
    """Run code in a fresh interpreter, outside the checkout, and return what it printed."""
    command = [sys.executable, "-c", code, *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd="/", env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def third_party_but(*roots):
    """Import names of everything installed that the named distributions do not require."""
    allowed, queue = set(), list(roots)
    while queue:
        name = queue.pop().lower().replace("_", "-")
        if name not in allowed:
            allowed.add(name)
            requirements = [Requirement(text) for text in distribution(name).requires or []]
            queue += [r.name for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]
    owners = packages_distributions()
    return sorted(
        package for package, names in owners.items() if not {n.lower().replace("_", "-") for n in names} & allowed
    )


HIDE = """
import importlib, importlib.machinery, json, sys
hidden = set(json.loads(sys.argv[1]))
class Finder(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in hidden else super().find_spec(name, path, target)
sys.meta_path = [Finder if f is importlib.machinery.PathFinder else f for f in sys.meta_path]
"""


def test_the_core_runs_with_what_it_requires_alone():
    hidden = [name for name in third_party_but("torch", "numpy", "einops", "jaxtyping") if name != "mamba_attn"]
    assert {"timm", "captum", "plotly", "PIL", "rich", "safetensors", "beartype"} <= set(hidden)
    code = f"""{HIDE}
started = {{name.split(".")[0] for name in sys.modules}}  # by .pth files: _distutils_hack
import mamba_attn, torch
model = mamba_attn.models.create("vim_micro", image_size=32, depth=2)
with torch.no_grad(), mamba_attn.trace(model, attention="mean") as trace:
    logits = model(torch.randn(2, 3, 32, 32))
attention = trace.layers[0].attention()
print(json.dumps([list(logits.shape), list(attention.shape), bool(attention.isfinite().all())]))
for name in {CORE}:
    importlib.import_module(name)
assert not (hidden - started) & {{name.split(".")[0] for name in sys.modules}}
"""
    logits, attention, finite = json.loads(run(code, json.dumps(hidden)))
    assert logits[0] == attention[0] == 2
    assert attention[1] == attention[2]
    assert finite


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, mamba_attn; print([n for n in sys.argv[1:] if n in sys.modules])"
    assert run(code, *HEAVY).strip() == "[]"


def test_integrations_are_not_importable_under_a_second_name():
    code = "import mamba_attn.integrations\ntry:\n    import integrations\nexcept ImportError as e:\n    print(e)"
    assert run(code).startswith("import mamba_attn.integrations instead")


def test_cuda_is_no_package_and_hides_nobody_elses():
    assert not list((ROOT / "cuda").glob("*.py"))
    code = "import importlib.resources as r; print(r.files('mamba_attn.cuda').joinpath('README.md').is_file())"
    assert run(code).strip() == "True"
