"""What ``mamba-attn doctor`` says on a whole and on a bare machine."""

import importlib.metadata as metadata

from mamba_attn.commands import cli, doctor
from mamba_attn.ops.cpu.build import library_origin, library_problem


def test_versions_backends_and_extras(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert cli.main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    rows = dict(line.split(None, 1) for line in text.splitlines() if len(line.split(None, 1)) == 2)
    assert rows["torch"].partition("+")[0] == metadata.version("torch").partition("+")[0]  # a build's name aside
    assert rows["blocked"] == "runs"
    assert rows["native"] in {f"runs ({library_origin()})", f"does not run: {library_problem()}"}
    assert f"timm {metadata.version('timm')}" in rows["timm"]
    missing = [line.split()[0] for line in text.splitlines() if "missing" in line]
    assert set(missing) <= {"scatter", "s3"}  # which `all` does not bring


def test_what_is_missing_says_how_to_get_it(capsys, monkeypatch):
    version = metadata.version

    def without(package):
        if package in ("timm", "umap-learn"):
            raise metadata.PackageNotFoundError(package)
        return version(package)

    monkeypatch.setattr(doctor.metadata, "version", without)
    monkeypatch.setattr("mamba_attn.ops.cpu.build.library_problem", lambda: "no C++ compiler was found")
    assert cli.main(["doctor"]) == 0
    words = " ".join(capsys.readouterr().out.split())
    assert "timm missing timm: pip install 'mamba_attn[timm]'" in words
    assert "missing umap-learn: pip install 'mamba_attn[embed]'" in words
    assert "native does not run: no C++ compiler was found" in words


def test_one_part_alone_and_a_part_that_is_not(capsys):
    assert cli.main(["doctor", "backends"]) == 0
    assert "python" not in capsys.readouterr().out
    assert cli.main(["doctor", "backend"]) == 2
    assert "'backend': " in capsys.readouterr().err
