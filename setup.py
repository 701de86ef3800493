"""Builds moreau_ext._core with CMake and Ninja; metadata is in pyproject.toml.

MOREAU_CUDA=AUTO|ON|OFF, CMAKE_CUDA_ARCHITECTURES, CUDACXX and CMAKE_ARGS are taken from the environment.
"""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


class CMakeExtension(Extension):
    def __init__(self, name: str) -> None:
        super().__init__(name, sources=[])


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        ninja = shutil.which("ninja")
        if ninja is None:
            raise SystemExit("moreau_ext: ninja was not found; `pip install ninja` and build again")
        configure = [
            "cmake",
            # A build in isolation leaves a cache that names a ninja and a pybind11 which are gone the next time.
            "--fresh",
            *("-S", str(Path(__file__).resolve().parent), "-B", str(build), "-G", "Ninja"),
            f"-DCMAKE_MAKE_PROGRAM={ninja}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DMOREAU_CUDA={os.environ.get('MOREAU_CUDA', 'AUTO')}",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build)], check=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(next(build.glob("_core*.so")), target)


setup(ext_modules=[CMakeExtension("moreau_ext._core")], cmdclass={"build_ext": CMakeBuild})
