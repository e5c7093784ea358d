"""What users may rely on: every public name resolves, says what its arguments are, and its example runs."""

import ast
import doctest
import importlib
import importlib.util
import inspect
import pkgutil
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

import mamba_attn
from mamba_attn.models import create

ROOT = Path(__file__).parent.parent
PACKAGE = Path(mamba_attn.__file__).parent


def public_modules():
    """Dotted names without an underscore."""
    found = ["mamba_attn"]
    for module in pkgutil.walk_packages([str(PACKAGE)], "mamba_attn."):
        if not any(part.startswith("_") for part in module.name.split(".")):
            found.append(module.name)
    return [*found, *(f"mamba_attn.integrations.{path.stem}" for path in ROOT.glob("integrations/[!_]*.py"))]


MODULES = public_modules()
PACKAGES = [name for name in MODULES if hasattr(importlib.import_module(name), "__all__")]
NAMES = [(package, name) for package in PACKAGES for name in importlib.import_module(package).__all__]


def test_the_front_door():
    assert {"trace", "models", "ops"} <= {*mamba_attn.__all__}
    assert len(mamba_attn.__all__) <= 28


@pytest.mark.parametrize("package", PACKAGES)
def test_all_is_what_star_imports(package):
    names = importlib.import_module(package).__all__
    assert len(set(names)) == len(names)
    namespace = {}
    exec(f"from {package} import *", namespace)
    assert set(names) <= set(namespace)


@pytest.mark.parametrize(("package", "name"), NAMES, ids=[f"{package}.{name}" for package, name in NAMES])
def test_public_names_are_documented_with_their_arguments(package, name):
    thing = getattr(importlib.import_module(package), name)
    if not callable(thing):
        return
    text = inspect.getdoc(thing)
    assert text
    if inspect.isclass(thing) and "Args:" not in text:
        return  # not made by users
    for parameter in inspect.signature(thing).parameters.values():
        if parameter.name not in ("self", "args", "kwargs", "options"):
            assert f"{parameter.name}:" in text, f"{package}.{name}: Args does not say what {parameter.name} is"


FOLDERS = [ROOT / "integrations", *(path.parent for path in sorted(PACKAGE.rglob("__init__.py")))]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_every_folder_says_what_it_is_for(folder):
    first, *rest = ast.get_docstring(ast.parse((folder / "__init__.py").read_text())).split("\n\n")
    assert first.endswith(".")
    assert "." in " ".join(rest), f"{folder.name}/__init__.py: say in another sentence what is public in it"


@pytest.fixture(scope="module")
def names_in_examples():
    """What examples take for granted."""
    vit = create("vit_micro", image_size=224, num_classes=1000, depth=6)
    return {"torch": torch, "model": create("vim_tiny", depth=7), "vit": vit, "images": torch.randn(2, 3, 224, 224)}


@pytest.mark.parametrize("module", MODULES)
def test_examples_run(module, names_in_examples):
    options = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    result = doctest.testmod(importlib.import_module(module), extraglobs=names_in_examples, optionflags=options)
    assert result.failed == 0


def reference():
    """What writes the API reference of the site, docs/_ext/api_pages.py."""
    spec = importlib.util.spec_from_file_location("api_pages", ROOT / "docs" / "_ext" / "api_pages.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_name_of_the_reference_has_an_example():
    pages, without = reference(), []
    for module in map(importlib.import_module, pages.MODULES):
        things = {name: getattr(module, name) for name in pages.public_names(module)}
        without += [f"{module.__name__}.{name}" for name, thing in things.items()
                    if callable(thing) and ">>>" not in inspect.getdoc(thing)]  # fmt: skip
    assert without == []


def test_the_reference_has_every_public_name_once():
    named = re.findall(r"auto(?:class|function):: (\S+)\.(\w+)", "\n".join(reference().pages().values()))
    written = [id(getattr(importlib.import_module(module), name)) for module, name in named]
    assert len(set(written)) == len(written)
    things = {f"{module}.{name}": getattr(importlib.import_module(module), name) for module, name in NAMES}
    assert not [name for name, thing in things.items() if callable(thing) and id(thing) not in written]


def test_one_version():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert mamba_attn.__version__ == version
    assert f"version: {version}" in (ROOT / "CITATION.cff").read_text()


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match=r"mamba_attn has no 'atribution'. Did you mean 'attribution'"):
        mamba_attn.atribution  # noqa: B018 - the access is the test
    assert not hasattr(mamba_attn, "docs")  # a folder next to the package in a checkout
    assert not hasattr(mamba_attn, "__wrapped__")


def test_every_room_is_there_without_importing_it_first():
    rooms = {module.name for module in pkgutil.iter_modules([str(PACKAGE)]) if not module.name.startswith("_")}
    assert {*rooms, "integrations"} <= {*dir(mamba_attn)}
    code = f"""
import sys, types, mamba_attn
assert "mamba_attn.attribution" not in sys.modules
for name in {sorted(rooms)}:
    assert isinstance(getattr(mamba_attn, name), types.ModuleType), name
assert mamba_attn.attribution.RawAttention and mamba_attn.integrations.__path__
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_type_checkers_are_shown_the_same_rooms():
    source = ast.parse((PACKAGE / "__init__.py").read_text())
    shown = {node.names[0].asname for node in ast.walk(source) if isinstance(node, ast.ImportFrom)} - {None}
    # the command line's, and integrations/, which a checkout keeps elsewhere
    assert shown == {*mamba_attn._ROOMS} - {"commands", "core", "integrations"}
