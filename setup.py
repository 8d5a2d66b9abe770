"""Build `otalign._C` with CMake if possible. If not, the package installs without it and keeps the reason."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import textwrap
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

# A venv that is not activated has its cmake outside PATH. Last in PATH, it never shadows another one.
PATH = os.environ.get("PATH", os.defpath) + os.pathsep + sysconfig.get_path("scripts")
# In CI, and where CUDA is requested, a failed build is an error.
REQUIRED = os.environ.get("OTALIGN_REQUIRE_EXT") == "1" or os.environ.get("OTALIGN_BUILD_CUDA") == "1"


def run(*command: str) -> str:
    """Run a command and return its output; raise OSError with the first error that it printed."""
    done = subprocess.run(
        command, env=os.environ | {"PATH": PATH}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    print(done.stdout, flush=True)
    if done.returncode:
        error = re.search(r"CMake Error.*\n\s*((?:(?: .*)?\n)+)|(.*\berror: .*)", done.stdout)
        raise OSError(textwrap.shorten(error[error.lastindex], 200) if error else f"{command[0]} failed")
    return done.stdout


class CMakeBuild(build_ext):
    def run(self):
        module = Path("" if self.inplace else self.build_lib, self.get_ext_filename("otalign._C"))
        module.unlink(missing_ok=True)  # if this build fails, no old module may remain
        super().run()
        info = f"EXTENSION = {self.outcome!a}\nCOMPILER = {self.compiler_id!a}\n"
        module.with_name("_build_info.py").write_text(info)

    def build_extension(self, ext):
        self.outcome, self.compiler_id = "built", None
        try:
            self.cmake(Path(self.get_ext_fullpath(ext.name)).parent.resolve())
        except (OSError, ImportError) as error:
            if REQUIRED:
                raise
            self.outcome = str(error)
            line = "!" * 80
            print(line, f"otalign is installed WITHOUT its C++ engine: {error}", line, sep="\n", file=sys.stderr)

    def cmake(self, destination: Path):
        import pybind11

        configured = run(
            "cmake",
            "--fresh",  # pip builds in a new environment each time: paths in an old cache are stale
            *("-S", ".", "-B", self.build_temp),
            *(["-G", "Ninja"] if shutil.which("ninja", path=PATH) else []),
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={destination}",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        )
        compiler = re.search(r"CXX compiler identification is (.*)", configured)
        self.compiler_id = compiler and compiler[1]
        run("cmake", "--build", self.build_temp)


setup(
    packages=[*find_packages(include=["otalign", "otalign.*"]), "otalign.triton_kernels"],
    package_dir={"otalign.triton_kernels": "triton_kernels"},
    ext_modules=[Extension("otalign._C", sources=[], optional=True)],
    cmdclass={"build_ext": CMakeBuild},
)
