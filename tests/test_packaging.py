"""What ships: the wheel holds the three folders and nothing else, and it works away from the checkout."""

import importlib.util
import os
import re
import shutil
import stat
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
VERSION = PROJECT["project"]["version"]
EXTRAS = PROJECT["project"]["optional-dependencies"]
WHERE = {"mamba_attn": "mamba_attn", "integrations": "mamba_attn/integrations", "cuda": "mamba_attn/cuda"}
CACHES = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "venv")


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """The sdist, and the wheel built from it, of a copy of the tree."""
    folder = tmp_path_factory.mktemp("packages")
    shutil.copytree(ROOT, folder / "tree", ignore=CACHES)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder / "dist"), str(folder / "tree")]
    build = subprocess.run(command, capture_output=True, text=True)
    assert build.returncode == 0, build.stdout + build.stderr
    return folder / "dist"


@pytest.fixture(scope="module")
def wheel(dist):
    with zipfile.ZipFile(dist / f"mamba_attn-{VERSION}-py3-none-any.whl") as archive:
        yield archive


@pytest.fixture(scope="module")
def metadata(wheel):
    return Parser().parsestr(wheel.read(f"mamba_attn-{VERSION}.dist-info/METADATA").decode())


def tree():
    """Where every file of the three folders belongs in a wheel."""
    for folder, target in WHERE.items():
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                yield f"{target}/{path.relative_to(ROOT / folder).as_posix()}"


def test_the_wheel_holds_the_three_folders_and_nothing_else(wheel):
    files = {name for name in wheel.namelist() if not name.startswith(f"mamba_attn-{VERSION}.dist-info/")}
    assert files == set(tree())
    suffixes = {Path(name).suffix for name in files}
    assert {".py", ".cpp", ".safetensors", ".json", ".md"} <= suffixes
    assert "mamba_attn/py.typed" in files
    assert sum(name.startswith("mamba_attn/data/") and name.endswith(".jpg") for name in files) >= 6


def test_the_sdist_holds_what_the_wheel_is_built_from(dist):
    with tarfile.open(dist / f"mamba_attn-{VERSION}.tar.gz") as archive:
        files = {name.partition("/")[2] for name in archive.getnames()}
    outside = [path.relative_to(ROOT).as_posix() for folder in WHERE for path in (ROOT / folder).rglob("*.py")]
    assert {*outside, "pyproject.toml", "README.md", "LICENSE", "cuda/README.md", "mamba_attn/py.typed"} <= files


def test_the_listed_packages_are_those_of_the_tree():
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "mamba_attn").rglob("__init__.py")}
    found = {".".join(folder.parts) for folder in folders} | {"mamba_attn.integrations", "mamba_attn.cuda"}
    assert found == set(PROJECT["tool"]["setuptools"]["packages"])


def test_metadata(metadata, wheel):
    assert metadata["Name"] == "mamba_attn"
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert set(metadata.get_all("Provides-Extra")) == set(EXTRAS)
    requirements = [Requirement(text) for text in metadata.get_all("Requires-Dist")]
    assert {r.name for r in requirements if not r.marker} == {"torch", "numpy", "einops", "jaxtyping"}
    others = [r for r in requirements if 'extra == "gpu"' not in str(r.marker)]
    assert not {r.name for r in others} & {"mamba-ssm", "causal-conv1d", "mambavision", "triton"}
    entry_points = wheel.read(f"mamba_attn-{VERSION}.dist-info/entry_points.txt").decode()
    assert entry_points.split() == ["[console_scripts]", "mamba-attn", "=", "mamba_attn.commands.cli:main"]
    licence = wheel.read(f"mamba_attn-{VERSION}.dist-info/licenses/LICENSE")
    assert licence == (ROOT / "LICENSE").read_bytes()
    assert b"Apache License\n                           Version 2.0, January 2004" in licence


def test_the_wheel_works_away_from_the_checkout(wheel, tmp_path):
    wheel.extractall(tmp_path / "site")
    code = """
import importlib.resources, sys, mamba_attn
import mamba_attn.commands.cli, mamba_attn.integrations.vim, mamba_attn.integrations.vmamba
assert mamba_attn.__file__.startswith(sys.argv[1]), mamba_attn.__file__
assert len(mamba_attn.__path__) == 1, mamba_attn.__path__
assert importlib.resources.files("mamba_attn.cuda").joinpath("README.md").is_file()
"""
    site = str(tmp_path / "site")
    command = [sys.executable, "-c", code, site]
    result = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": site}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr


def pins():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9][0-9a-z.]*", line) for line in lines)
    return dict(line.split("==") for line in lines)


def requirements_of(extra):
    """What an extra of ours installs directly, our other extras followed."""
    for text in EXTRAS[extra]:
        requirement = Requirement(text)
        if requirement.name == "mamba_attn":
            for other in requirement.extras:
                yield from requirements_of(other)
        else:
            yield requirement


def test_everything_that_dev_installs_is_pinned_to_a_version_it_allows():
    pinned = pins()
    wanted = [*map(Requirement, PROJECT["project"]["dependencies"]), *requirements_of("dev")]
    assert "torchvision" in pinned  # timm brings it
    assert "nvidia-cuda-nvrtc" not in pinned  # CUDA builds of torch pin theirs
    for requirement in wanted:
        if requirement.name == "nvidia-cuda-nvrtc":
            continue
        assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)]), requirement


def test_all_and_dev_reach_every_extra():
    reached = {requirement.name for requirement in requirements_of("dev")}
    for extra in EXTRAS:
        its = {requirement.name for requirement in requirements_of(extra)}
        assert extra in ("gpu", "scatter") or its <= reached, extra


def test_pre_commit_runs_the_pinned_ruff():
    (revision,) = re.findall(r"rev: v(\S+)", (ROOT / ".pre-commit-config.yaml").read_text())
    assert revision == pins()["ruff"]


def test_readme_says_the_two_commands_that_ci_runs():
    lines = (ROOT / "README.md").read_text().splitlines()
    install = "pip install -c constraints.txt -e '.[dev]'"
    assert lines.count(f"{install} && mamba-attn explain") == 1
    assert lines.count(f"{install} && pytest") == 1
    assert (ROOT / ".ci/run").stat().st_mode & stat.S_IXUSR


def script(name):
    """A script of .ci/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / ".ci" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_readme_of_a_release_names_the_host_everywhere():
    absolute = script("absolute")
    text = absolute.absolute((ROOT / "README.md").read_text(), "https://host/us/it", "v1.2.3")
    links = re.findall(r"\]\(([^)]*)\)", text)
    assert links
    assert all(link.startswith("https://") for link in links)
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]*)\)", text)
    assert "https://host/us/it/raw/v1.2.3/docs/first_light.jpg" in pictures
    project = absolute.with_urls((ROOT / "pyproject.toml").read_text(), "https://host/us/it", "v1.2.3")
    urls = tomllib.loads(project)["project"]["urls"]
    assert urls["Repository"] == "https://host/us/it"
    assert {"Documentation", "Changelog", "Issues", "Paper"} <= set(urls)


def test_results_of_two_states_are_compared(tmp_path):
    results = script("compare_results")
    old, new = {"time": (2.0, "ms"), "gone": (1.0, "ms")}, {"time": (3.0, "ms"), "only new": (1.0, "x")}
    assert results.table(old, new).splitlines()[2:] == ["| time | 2 ms | 3 ms | 1.50 |"]
    assert results.rows(ROOT / "benchmarks" / "results")


def test_the_makefile_has_the_five_commands():
    lines = (ROOT / "Makefile").read_text().splitlines()
    assert [line.partition(":")[0] for line in lines if " ## " in line] == [
        "help", "setup", "test", "lint", "docs", "pictures",
    ]  # fmt: skip
    assert f"\t{'pip install -c constraints.txt -e '}'.[dev]'" in lines


def test_workflows_say_what_was_not_run():
    for path in (ROOT / ".github" / "workflows").glob("*.yml"):
        head = path.read_text().partition("\nname:")[0]
        assert re.search(r"[Nn]ot run yet|not been run yet", head), path.name


def test_nothing_else_stands_at_the_top():
    folders = {"mamba_attn", "integrations", "cuda", "tests", "benchmarks", "docs"}
    files = {"pyproject.toml", "constraints.txt", "README.md", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md"}
    files |= {"SECURITY.md", "CODE_OF_CONDUCT.md", "Makefile", "setup.py"}
    hidden = {".ci", ".github", ".gitignore", ".pre-commit-config.yaml"}
    command = ["git", "-c", "safe.directory=*", "-C", str(ROOT), "ls-files", "-z"]
    tracked = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split("\0")
    top = {name.split("/")[0] for name in tracked if name}
    assert top <= folders | files | hidden | {"CITATION.cff", ".gitattributes"}
