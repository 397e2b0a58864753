"""Builds csrc/ into `sipo_kernels/_native.so`: the CPU part where a C++ compiler is found, the CUDA part with nvcc.

The library has a plain C interface and is loaded through ctypes: building it needs neither torch nor Python's
headers, and one wheel serves every Python version. What cannot be built is left out, the installation goes on without
it, and `sipo_kernels/_build_info.json` keeps the reason for `sipo doctor`. That file also says what was built:

    {"library": file name or null,
     "digest": what the library was made from; null if a compilation failed, which the next build tries again,
     "parts": {"cpu": {"built": true, "reason": null, "compiler": str, "flags": [str], "isas": [str]},
               "cuda": {"built": true, "reason": null, "compiler": str, "flags": [str], "archs": [str]}}}

A part that was left out has `"built": false` and a reason, and no more.

Environment: CXX, CXXFLAGS and LDFLAGS as usual; CUDACXX, CUDA_HOME or CUDA_PATH say where nvcc is, and
SIPO_CUDA_ARCHS="80;90a" for which GPUs it compiles ("none": the CUDA part is left out); SIPO_SKIP_NATIVE=1 leaves the
library out.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
PACKAGE = "sipo_kernels"
# The library carries it, and the package, which needs no torch for that, compares it with the sources at hand.
sources_digest = runpy.run_path(str(ROOT / PACKAGE / "build_info.py"))["sources_digest"]
LIBRARY = "_native.dylib" if sys.platform == "darwin" else "_native.so"
RECORD = "_build_info.json"

COMMON_FLAGS = ["-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-pthread", "-Icsrc"]
# One translation unit for each instruction set; the dispatcher picks among them when the library is loaded.
X86_ISAS = {
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"],
}
# A symbol that no unit defines shall fail the build and not the user's first call.
LINK_FLAGS = ["-shared", "-pthread"] + (["-ldl", "-Wl,-z,defs"] if sys.platform.startswith("linux") else [])

CUDA_FLAGS = ["-O3", "-std=c++17", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall", "-Icsrc"]
CUDA_FLAGS += ["-Xfatbin=-compress-all", "--threads=0"]  # a quarter of the size; the architectures side by side
# The CUDA runtime goes in with its symbols hidden: the library then loads where there is no CUDA, and shares nothing
# but the driver with torch, which brings a runtime of its own and perhaps of another version.
CUDA_LINK_FLAGS = ["-lcudart_static", "-lrt", "-ldl", "-Wl,--exclude-libs,ALL"]
CUDA_ARCHS = ("80", "86", "89", "90a", "100", "120")  # those of them that the toolkit has
OLDEST_CUDA_ARCH = 80  # bfloat16 conversions
USUAL_NVCC = "/usr/local/cuda/bin/nvcc"

BACKENDS = {"cpu": "native CPU", "cuda": "CUDA"}  # each part's, in what the build prints


class LeftOutError(Exception):
    """Why a part of the library is not built, in one line."""


class Unit(NamedTuple):
    """One object file: a source below csrc/, and the compiler with all flags."""

    name: str
    source: str
    command: list[str]


class Part(NamedTuple):
    """What compiles and links one part of the library, and what the record says of it beyond that."""

    compiler: str
    flags: list[str]
    details: dict[str, Any]
    units: list[Unit]
    link_flags: list[str]

    def record(self) -> dict[str, Any]:
        return {"built": True, "reason": None, "compiler": self.compiler, "flags": self.flags, **self.details}


def run(command: Sequence[str], what: str, show: bool = True) -> str:
    """Runs a compiler in the source tree and returns all that it printed; a failure is a LeftOutError."""
    try:
        english = {**os.environ, "LC_ALL": "C"}
        done = subprocess.run(command, cwd=ROOT, env=english, capture_output=True, text=True)
    except OSError as error:
        raise LeftOutError(f"{what}: cannot run {command[0]!r} ({error.strerror})") from None
    if show:
        print(done.stderr, end="", file=sys.stderr)
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["it printed nothing"]
        telling = [line for line in lines if re.search("error|fatal|undefined |cannot find ", line)]
        raise LeftOutError(f"{what}: {command[0]} failed ({(telling or lines)[0].strip()})")
    return done.stdout + done.stderr


def find_compiler() -> list[str]:
    """The C++ compiler's command, from CXX or the usual names."""
    named = shlex.split(os.environ.get("CXX", ""))
    if named:
        return named
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name):
            return [name]
    raise LeftOutError("no C++ compiler found (looked for c++, g++ and clang++; CXX names another)")


def cpu_part(command: list[str]) -> Part:
    """csrc/cpu: one unit for each instruction set that the compiler's target may have, and the dispatcher."""
    compiler = run([*command, "--version"], "asking for the compiler's version").splitlines()[0]
    target = run([*command, "-dumpmachine"], "asking for the compiler's target").strip()
    isas = X86_ISAS if target.startswith(("x86_64", "amd64")) else {}
    flags = COMMON_FLAGS + shlex.split(os.environ.get("CXXFLAGS", ""))
    base = [*command, *flags]
    own = [f'-DSIPO_SOURCES="{sources_digest(ROOT)}"', *(["-DSIPO_X86=1"] if isas else [])]
    units = [Unit("pair_loss", "csrc/cpu/pair_loss.cpp", base + own)]
    for isa in ("portable", *isas):
        own = [f"-DSIPO_ISA={isa}", *isas.get(isa, [])]
        units.append(Unit(f"pair_kernels_{isa}", "csrc/cpu/pair_kernels.cpp", base + own))
    link_flags = LINK_FLAGS + shlex.split(os.environ.get("LDFLAGS", ""))
    return Part(compiler, flags, {"isas": ["portable", *isas]}, units, link_flags)


def find_nvcc() -> list[str]:
    """nvcc's command, from CUDACXX, CUDA_HOME, CUDA_PATH, the search path or the usual place."""
    named = shlex.split(os.environ.get("CUDACXX", ""))
    if named:
        return named
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    for candidate in (*(os.path.join(home, "bin", "nvcc") for home in homes), "nvcc", USUAL_NVCC):
        if found := shutil.which(candidate):
            return [found]
    places = f"CUDACXX, CUDA_HOME, CUDA_PATH, the search path and {USUAL_NVCC}"
    raise LeftOutError(f"no CUDA compiler found (looked for nvcc in {places})")


def cuda_archs(nvcc: list[str]) -> list[str]:
    """For which GPUs to compile, oldest first: all of CUDA_ARCHS that the toolkit has, or what SIPO_CUDA_ARCHS says."""

    def age(arch: str) -> tuple[int, str]:
        return int(arch.rstrip("abcdef")), arch

    listed = re.findall(r"\bsm_(\d+[a-z]?)\b", run([*nvcc, "--list-gpu-code"], "asking nvcc for its architectures"))
    # sm_90a, sm_90 with the instructions that no other architecture has, is not always in the list.
    known = {arch for arch in [*listed, *(["90a"] if "90" in listed else [])] if age(arch)[0] >= OLDEST_CUDA_ARCH}
    allowed = sorted(known, key=age)
    wanted = re.split(r"[;,\s]+", os.environ.get("SIPO_CUDA_ARCHS", "").strip(";, \t\n"))
    if wanted == [""]:
        wanted = [arch for arch in CUDA_ARCHS if arch in known]
        if not wanted:
            raise LeftOutError(f"this nvcc compiles for none of {', '.join(CUDA_ARCHS)}")
    for arch in wanted:
        if arch not in known:
            raise LeftOutError(f"SIPO_CUDA_ARCHS: {arch!r} is none of {', '.join(allowed)} (or 'none')")
    return sorted(set(wanted), key=age)


def cuda_part(cxx: list[str]) -> Part:
    """csrc/cuda, one unit for each source, with machine code for each architecture and PTX for what comes after.

    Args:
        cxx: the C++ compiler's command, nvcc's host compiler where the two agree.
    """
    chosen = os.environ.get("SIPO_CUDA_ARCHS", "").strip()
    if chosen in ("0", "none"):
        raise LeftOutError(f"SIPO_CUDA_ARCHS={chosen} was set")
    nvcc = find_nvcc()
    version = run([*nvcc, "--version"], "asking for nvcc's version").splitlines()
    compiler = next((line for line in version if "release" in line), version[-1] if version else "")
    archs = cuda_archs(nvcc)
    flags = [*CUDA_FLAGS, *(f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs)]
    # PTX of compute_90a would run on sm_90a alone.
    newest = archs[-1].rstrip("abcdef")
    flags.append(f"-gencode=arch=compute_{newest},code=compute_{newest}")
    try:  # A launcher such as ccache would stand before the compiler. nvcc refuses what is too new for it.
        host = ["-ccbin", cxx[-1]]
        run([*nvcc, *host, "-E", "-x", "cu", os.devnull], "trying the host compiler", show=False)
        flags += host
    except LeftOutError:
        pass  # nvcc's own choice then
    sources = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc" / "cuda").glob("*.cu"))
    if not sources:
        raise LeftOutError("there is no source csrc/cuda/*.cu")
    units = [Unit(f"cuda_{Path(source).stem}", source, [*nvcc, *flags]) for source in sources]
    # Where its runtime lies, nvcc tells when asked what it would do.
    would_do = run([*nvcc, "-dryrun", "-x", "cu", os.devnull], "asking nvcc for its libraries", show=False)
    libraries = "".join(re.findall(r"^#\$ LIBRARIES=(.*)$", would_do, re.MULTILINE))
    folders = [word for word in shlex.split(libraries) if word.startswith("-L")]
    return Part(compiler, flags, {"archs": archs}, units, [*folders, *CUDA_LINK_FLAGS])


def without_cpu(reason: str) -> str:
    return f"the CPU part, in the same library, is left out: {reason}"


def find_parts() -> tuple[dict[str, Part], dict[str, str]]:
    """The parts that can be tried, CPU first, and why others cannot."""
    parts: dict[str, Part] = {}
    left_out: dict[str, str] = {}
    try:
        if os.environ.get("SIPO_SKIP_NATIVE", "0") not in ("", "0"):
            raise LeftOutError("SIPO_SKIP_NATIVE was set")
        if sys.platform == "win32":
            raise LeftOutError("there is no Windows build of the native library")
        cxx = find_compiler()
        parts["cpu"] = cpu_part(cxx)
        try:
            parts["cuda"] = cuda_part(cxx)
        except LeftOutError as why:
            left_out["cuda"] = str(why)
    except LeftOutError as why:
        left_out = {"cpu": str(why), "cuda": without_cpu(str(why))}
    return parts, left_out


def compile_unit(unit: Unit, folder: str) -> str:
    """Compiles one unit into `folder` and returns the object file."""
    target = os.path.join(folder, f"{unit.name}.o")
    run([*unit.command, "-c", unit.source, "-o", target], unit.name)
    return target


def link(parts: Sequence[Part], objects: Sequence[str], target: Path) -> None:
    """Links aside and renames: a running process may have the old library mapped."""
    aside = target.with_name(f".{target.name}.{os.getpid()}")
    flags = [flag for part in parts for flag in part.link_flags]
    try:
        run([*find_compiler(), *objects, *flags, "-o", str(aside)], "linking")
        os.replace(aside, target)
    finally:
        aside.unlink(missing_ok=True)


def build(parts: dict[str, Part], library: Path) -> dict[str, str]:
    """Compiles all units side by side and links the parts that compiled; returns why others did not."""
    failed: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        # CUDA, which takes the longest, first.
        jobs = {
            name: [pool.submit(compile_unit, unit, folder) for unit in part.units]
            for name, part in reversed(parts.items())
        }
        objects: dict[str, list[str]] = {}
        for name in parts:
            try:
                objects[name] = [job.result() for job in jobs[name]]
            except LeftOutError as why:
                failed[name] = str(why)
        while "cpu" in objects:  # What does not link is left out, the last part first.
            try:
                link([parts[name] for name in objects], [file for files in objects.values() for file in files], library)
                break
            except LeftOutError as why:
                name = [*objects][-1]
                failed[name] = str(why)
                del objects[name]
    if "cpu" in failed and "cuda" in parts:
        failed["cuda"] = without_cpu(failed["cpu"])
    return failed


def digest(parts: dict[str, Part], left_out: dict[str, str]) -> str:
    """Changes with every source, header, flag and compiler version, and with what is left out and why."""
    nvcc_reads = [os.environ.get(name) for name in ("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS")]
    made_from = hashlib.sha256(repr((parts, left_out, nvcc_reads)).encode())
    for path in native_sources():
        made_from.update(path.encode() + b"\0" + (ROOT / path).read_bytes())
    return made_from.hexdigest()


def native_sources() -> list[str]:
    """Every file below csrc/, relative to the source tree, in a fixed order."""
    return sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob("*") if path.is_file())


def recorded_digest(record: Path) -> str | None:
    """What an earlier build wrote down, or None where there is no readable record."""
    try:
        return json.loads(record.read_text(encoding="utf-8"))["digest"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


class BuildNative(build_ext):
    """Builds the shared library in place of setuptools' way of building an extension module."""

    def run(self) -> None:
        folder = ROOT / PACKAGE if self.inplace else Path(self.build_lib, PACKAGE)
        folder.mkdir(parents=True, exist_ok=True)
        library, record = folder / LIBRARY, folder / RECORD
        parts, left_out = find_parts()
        made_from = digest(parts, left_out) if parts else None
        current = library.exists() and made_from is not None and recorded_digest(record) == made_from
        if self.force or not current:
            failed = build(parts, library)
            left_out |= failed
            if "cpu" in left_out:
                library.unlink(missing_ok=True)  # one that an earlier build left would not fit the sources
            info = {
                "library": None if "cpu" in left_out else LIBRARY,
                "digest": None if failed else made_from,
                "parts": {
                    name: {"built": False, "reason": left_out[name]} if name in left_out else parts[name].record()
                    for name in BACKENDS
                },
            }
            record.write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")
        for name, reason in left_out.items():
            print(f"sipo: the {BACKENDS[name]} backend is left out: {reason}", file=sys.stderr)

    def get_source_files(self) -> list[str]:
        return native_sources()

    def get_outputs(self) -> list[str]:
        return [path for path in self._in_build_lib() if os.path.exists(path)]

    def get_output_mapping(self) -> dict[str, str]:
        if not self.inplace:
            return {}
        in_place = [ROOT / PACKAGE / os.path.basename(path) for path in self._in_build_lib()]
        pairs = zip(self._in_build_lib(), in_place, strict=True)
        return {path: str(there) for path, there in pairs if there.exists()}

    def _in_build_lib(self) -> list[str]:
        return [os.path.join(self.build_lib, PACKAGE, name) for name in (LIBRARY, RECORD)]


class PlatformWheel(bdist_wheel):
    """Tags a wheel by the platform when it holds the library, and by nothing when it does not."""

    def get_tag(self) -> tuple[str, str, str]:
        # bdist_wheel asks when the build is over; it writes `root_is_pure` to the metadata later.
        library = Path(self.get_finalized_command("build_ext").build_lib, PACKAGE, LIBRARY)
        self.root_is_pure = not library.exists()
        _, _, plat = super().get_tag()
        # A universal Python still compiles for one architecture.
        return "py3", "none", plat.replace("universal2", platform.machine())


setup(
    ext_modules=[Extension(f"{PACKAGE}._native", sources=[])],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": PlatformWheel},
)
