"""Build llama.cpp's `llama-bench` and `test-backend-ops` from the source that the package llama-cpp-python carries.

    python -m pip download --no-deps --no-binary llama-cpp-python llama-cpp-python
    python -m prestage.calibration.llama_cpp.build cut llama_cpp_python-*.tar.gz llama.cpp.tar.xz
    python -m prestage.calibration.llama_cpp.build make llama.cpp.tar.xz FOLDER --cuda

`cut` keeps what the two programs need, some 2 MB, so that it can be carried to a machine that reaches nothing. `make`
needs cmake, ninja and a C++ compiler; with `--cuda` also nvcc. Without flash attention's kernels, and for the one
architecture of the GPU that is there, 16 cores take under four minutes; with them, several times as long.
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path

from ...errors import InputError

#: What is kept of llama.cpp, below its root.
_KEPT = ("CMakeLists.txt", "LICENSE", "AUTHORS", "cmake/", "ggml/", "src/", "common/", "include/", "licenses/",
         "vendor/", "tools/llama-bench/", "tests/test-backend-ops.cpp", "scripts/build-info")  # fmt: skip
#: Backends of other devices than CPUs and NVIDIA's GPUs.
_OTHERS = ("blas", "cann", "et", "hexagon", "metal", "opencl", "openvino", "rpc", "sycl", "virtgpu", "vulkan",
           "webgpu", "zdnn", "zendnn")  # fmt: skip
_LEFT_OUT = tuple(f"ggml/src/ggml-{name}/" for name in _OTHERS)
#: In place of the lists of all tools and all tests.
_LISTS = {
    "tools/CMakeLists.txt": "llama_add_compile_flags()\nadd_subdirectory(llama-bench)\n",
    "tests/CMakeLists.txt": "llama_add_compile_flags()\nadd_executable(test-backend-ops test-backend-ops.cpp)\n"
    "target_link_libraries(test-backend-ops PRIVATE llama llama-common)\n",
}
#: The programs that `make` builds.
PROGRAMS = ("llama-bench", "test-backend-ops")


class BuildError(InputError):
    """A source that is not llama.cpp's, or a build that failed: one line saying what was met."""


def cut(package: Path, out: Path) -> int:
    """Write what is needed of llama.cpp, as the source package has it, to a .tar.xz; return how many files.

    Raises BuildError if the package holds no llama.cpp.
    """
    kept = 0
    with tarfile.open(package) as source, tarfile.open(out, "w:xz", preset=6) as target:
        for member in source:
            _, at, name = member.name.partition("vendor/llama.cpp/")
            if not at or not name.startswith(_KEPT) or name.startswith(_LEFT_OUT):
                continue
            content = source.extractfile(member)  # equal files are links to one of them
            if content is not None:
                _add(target, name, content.read())
                kept += 1
        for name, text in _LISTS.items():
            _add(target, name, text.encode())
    if not kept:
        out.unlink()
        raise BuildError(f"{package}: holds no vendor/llama.cpp: give the source package of llama-cpp-python (.tar.gz)")
    return kept + len(_LISTS)


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(f"llama.cpp/{name}")
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def make(source: Path, folder: Path, *, architecture: str | None = None, flash_attention: bool = False,
         jobs: int | None = None, programs: Sequence[str] = PROGRAMS) -> list[Path]:  # fmt: skip
    """Build the programs in a folder from what `cut` wrote; return their paths. Raises BuildError if that fails.

    `architecture`: of the GPU, as CUDA counts, or native; None: without CUDA.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(source) as archive:
        archive.extractall(folder, filter="data")
    made = folder / "build"
    options = _options(architecture, flash_attention)
    # Without the driver's library the pool of virtual memory cannot be linked; llama.cpp's other pool does.
    for more in ({}, {"GGML_CUDA_NO_VMM": "ON"}) if architecture else ({},):
        configure = ["cmake", "-G", "Ninja", "-S", str(folder / "llama.cpp"), "-B", str(made)]
        configure += [f"-D{key}={value}" for key, value in (options | more).items()]
        failed = _call(configure)
        if not failed:
            break
        shutil.rmtree(made, ignore_errors=True)
    # -k0: what fails of one program leaves the other.
    failed = failed or _call(["ninja", "-C", str(made), "-k0", f"-j{jobs or os.cpu_count()}", *programs])
    if failed:
        raise BuildError(failed)
    return [made / "bin" / program for program in programs]


def _options(architecture: str | None, flash_attention: bool) -> dict[str, str]:
    """Returns cmake's options."""
    options = {
        "CMAKE_BUILD_TYPE": "Release",
        "BUILD_SHARED_LIBS": "OFF",
        "LLAMA_BUILD_TESTS": "ON",
        "LLAMA_BUILD_TOOLS": "ON",
        "LLAMA_BUILD_SERVER": "OFF",
        "LLAMA_BUILD_EXAMPLES": "OFF",
        "LLAMA_BUILD_APP": "OFF",
        "LLAMA_OPENSSL": "OFF",
        "GGML_NATIVE": "ON",
        "GGML_CUDA": "ON" if architecture else "OFF",
    }
    if architecture:
        options |= {
            "CMAKE_CUDA_ARCHITECTURES": architecture,
            "GGML_CUDA_FA": "ON" if flash_attention else "OFF",
            "GGML_CUDA_FA_QUANTS": "f16-f16",
            "GGML_CUDA_NCCL": "OFF",
            **_cublas_of_python(),
        }
    return options


def _cublas_of_python() -> dict[str, str]:
    """Returns where cuBLAS is if Python's packages have it, as PyTorch's do, and the toolkit may not."""
    for place in sys.path:
        for library in sorted(Path(place).glob("nvidia/*/lib/libcublas.so.*")):
            include = library.parents[1] / "include"
            light = sorted(library.parent.glob("libcublasLt.so.*"))
            if (include / "cublas_v2.h").is_file() and light:
                # -idirafter: the toolkit's own headers come first.
                flags = f"-idirafter {include}"
                return {
                    "CUDA_cublas_LIBRARY": str(library), "CUDA_cublasLt_LIBRARY": str(light[-1]),
                    "CMAKE_CXX_FLAGS": flags, "CMAKE_CUDA_FLAGS": f"-Xcompiler '{flags}' -I{include}",
                    "CMAKE_BUILD_RPATH": str(library.parent),
                }  # fmt: skip
    return {}


def _call(command: Sequence[str]) -> str:
    """Run a command, its output on standard error; return what failed, or nothing."""
    try:
        status = subprocess.run(command, stdout=sys.stderr).returncode
    except OSError as error:
        return f"{command[0]}: cannot be run: {error.strerror or error}"
    return f"{' '.join(command)}: exit status {status}" if status else ""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(prog="python -m prestage.calibration.llama_cpp.build", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    verbs = parser.add_subparsers(dest="verb", required=True)
    cutting = verbs.add_parser("cut", help="keep what is needed of the source package")
    cutting.add_argument("package", type=Path)
    cutting.add_argument("out", type=Path)
    making = verbs.add_parser("make", help="build")
    making.add_argument("source", type=Path)
    making.add_argument("folder", type=Path)
    making.add_argument("--cuda", action="store_true")
    making.add_argument("--flash-attention", action="store_true", help="also its kernels: takes much longer")
    making.add_argument("--architecture", default="native", help="of the GPU, as CUDA counts: 90 is Hopper")
    making.add_argument("--jobs", type=int)
    making.add_argument("--programs", nargs="+", default=PROGRAMS, choices=PROGRAMS)
    given = parser.parse_args(arguments)
    try:
        if given.verb == "cut":
            print(f"{given.out}: {cut(given.package, given.out)} files, {given.out.stat().st_size} bytes")
        else:
            architecture = given.architecture if given.cuda else None
            for path in make(given.source, given.folder, architecture=architecture, jobs=given.jobs,
                             flash_attention=given.flash_attention, programs=given.programs):  # fmt: skip
                print(path)
    except InputError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
