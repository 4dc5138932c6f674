# SPDX-License-Identifier: Apache-2.0
"""Builds the C++ (and, with nvcc, CUDA) extension with CMake and ninja. No torch is needed to build.

Environment:
    SPATIAL_PE_CUDA        1, 0 or auto (default: if nvcc is on the PATH)
    SPATIAL_PE_CUDA_ARCHS  e.g. "80;90" (default: 80;90;100;120, as far as nvcc knows them)
    SPATIAL_PE_SANITIZE    sanitizers of the CPU kernels, e.g. "address,undefined"
    SPATIAL_PE_REQUIRE_EXT 1: fail if the extension cannot be built. By default the install goes on without it
                           (reference, composed and Triton backends work), and `spatial-pe doctor` says why.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
CMAKE_OPTIONS = ("SPATIAL_PE_CUDA", "SPATIAL_PE_CUDA_ARCHS", "SPATIAL_PE_SANITIZE")
# in the package: read by `spatial-pe doctor`
FAILURE, CUDA_FAILURE = "_build_failure.txt", "_cuda_build_failure.txt"


class CMakeBuild(build_ext):
    def run(self):
        package = Path(self.get_ext_fullpath("spatial_pe._C")).resolve().parent
        package.mkdir(parents=True, exist_ok=True)
        for stale in self.built(package):  # of a build with other options
            stale.unlink()
        reason = self.missing_tool() or self.cmake(package)
        if reason is None:
            return
        if os.environ.get("SPATIAL_PE_REQUIRE_EXT") == "1":
            raise RuntimeError(f"the extension could not be built: {reason}")
        if shutil.which("nvcc") and self.cmake(package, "-DSPATIAL_PE_CUDA=0") is None:  # the CPU kernels at least
            (package / CUDA_FAILURE).write_text(reason + "\n")
            print(f"warning: installing spatial_pe without its CUDA kernels: {reason}", file=sys.stderr)
            return
        (package / FAILURE).write_text(reason + "\n")
        print(f"warning: installing spatial_pe without its compiled kernels: {reason}", file=sys.stderr)

    @staticmethod
    def missing_tool():
        compilers = [os.environ["CXX"].split()[0]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
        if not any(shutil.which(name) for name in compilers):
            return f"no C++ compiler found (looked for {', '.join(compilers)}): install g++ or set CXX"
        if not shutil.which("cmake") or not shutil.which("ninja"):
            return "cmake and ninja are needed to build without build isolation: pip install cmake ninja"
        return None

    def cmake(self, package, *more):
        import pybind11

        options = [f"-D{name}={os.environ[name]}" for name in CMAKE_OPTIONS if os.environ.get(name)]
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            # fresh: the cache of an earlier build names tools of its own isolated environment, gone by now
            *("cmake", "--fresh", "-S", ROOT / "csrc", "-B", build, "-G", "Ninja"),
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_INSTALL_PREFIX={package.parent}",
            *options,
            *more,
        ]
        for command in (configure, ["cmake", "--build", build], ["cmake", "--install", build]):
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            print(done.stdout)
            if done.returncode:
                errors = [line for line in done.stdout.splitlines() if re.search("error|fatal", line, re.IGNORECASE)]
                return f"{' '.join(map(str, command[:2]))} failed: {(errors or done.stdout.splitlines() or ['?'])[0]}"
        return None

    @staticmethod
    def built(package):
        return [path for pattern in ("_C.*", "_cuda.*", FAILURE, CUDA_FAILURE) for path in package.glob(pattern)]

    def get_outputs(self):
        return [str(path) for path in self.built(Path(self.get_ext_fullpath("spatial_pe._C")).parent)]

    def get_source_files(self):
        return [str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*") if p.is_file()]


setup(ext_modules=[Extension("spatial_pe._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
