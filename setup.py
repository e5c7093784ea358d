"""Puts the CPU kernel, compiled for every kind of CPU, into the wheel where MAMBA_ATTN_PREBUILT=1; else it is pure."""

import os
import re
import runpy
import sysconfig
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

PREBUILT = os.environ.get("MAMBA_ATTN_PREBUILT") == "1"
KERNEL = "mamba_attn/ops/cpu"
# the newest version of a library's symbols that the kernel may need, or None: it names the wheel's platform
VERSIONS = {rb"GLIBC_2\.(\d+)": None, rb"GLIBCXX_3\.4\.(\d+)": 19, rb"CXXABI_1\.3\.(\d+)": 7}


class Platform(Distribution):
    """A distribution that is not the same on every platform."""

    def has_ext_modules(self) -> bool:
        """Tell setuptools, which knows of no extension here."""
        return PREBUILT


class Build(build_py):
    """Compiles the kernel into the folder that becomes the wheel."""

    def run(self) -> None:
        """Copy the package, then compile."""
        super().run()
        if PREBUILT and not self.editable_mode:
            prebuild = runpy.run_path(f"{KERNEL}/compiling.py")["prebuild"]
            prebuild(Path(KERNEL).resolve(), Path(self.build_lib, KERNEL, "prebuilt"))


class Wheel(bdist_wheel):
    """Any Python 3, because the kernel is loaded by ctypes; the platform that its files need."""

    def get_tag(self) -> tuple[str, str, str]:
        """Return the tags of the wheel's name."""
        python, abi, system = super().get_tag()
        if not PREBUILT:
            return python, abi, system
        if sysconfig.get_platform().startswith("linux-"):
            system = f"manylinux_2_{self._glibc()}_{sysconfig.get_platform().removeprefix('linux-').replace('-', '_')}"
        return "py3", "none", system

    def _glibc(self) -> int:
        """Return x of the oldest glibc 2.x that runs the kernel: 17 or newer."""
        files = Path(self.get_finalized_command("build_py").build_lib, KERNEL, "prebuilt").glob("*.so")
        found = b"".join(file.read_bytes() for file in files)
        needed = {version: max(map(int, re.findall(version, found)), default=0) for version in VERSIONS}
        for version, most in VERSIONS.items():
            if most is not None and needed[version] > most:
                raise RuntimeError(f"the kernel needs {version.decode()} {needed[version]}; manylinux_2_17 has {most}.")
        return max(17, needed[rb"GLIBC_2\.(\d+)"])


setup(cmdclass={"build_py": Build, "bdist_wheel": Wheel}, distclass=Platform)
