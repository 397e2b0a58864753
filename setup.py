"""Builds csrc/ into `sipo_kernels/_native.so`: the CPU part if there is a C++ compiler, the CUDA part if there is nvcc.

The library has a plain C interface and is loaded through ctypes: building it needs neither torch nor Python's
headers, and one wheel serves every Python version. What cannot be built is left out, and the installation continues
without it. `sipo_kernels/_build_info.json` records what was built and why the rest was not:

    {"library": file name or null,
     "digest": of all that the library depends on; null if a compilation failed, which the next build tries again,
     "parts": {"cpu": {"built": true, "reason": null, "compiler": str, "flags": [str], "isas": [str]},
               "cuda": {"built": true, "reason": null, "compiler": str, "flags": [str], "archs": [str]}}}

A part that was left out has only `"built": false` and a reason.

Environment variables: CXX, CXXFLAGS and LDFLAGS as usual; CUDACXX, CUDA_HOME or CUDA_PATH to say where nvcc is;
SIPO_CUDA_ARCHS="80;90a" to compile for these GPUs only ("none" leaves out the CUDA part); SIPO_SKIP_NATIVE=1 to leave
out the library.
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
from types import SimpleNamespace
from typing import Any, NamedTuple

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
PACKAGE = "sipo_kernels"
# An import would need torch.
build_info = SimpleNamespace(**runpy.run_path(str(ROOT / PACKAGE / "build_info.py")))
LIBRARY = "_native.dylib" if sys.platform == "darwin" else "_native.so"
RECORD = "_build_info.json"

COMMON_FLAGS = ["-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-pthread", "-Icsrc"]
# One translation unit for each instruction set; csrc/cpu/pair_loss.cpp chooses one at run time.
X86_ISAS = {
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"],
}
# An undefined symbol fails the build, not the user's first call.
LINK_FLAGS = ["-shared", "-pthread"] + (["-ldl", "-Wl,-z,defs"] if sys.platform.startswith("linux") else [])

CUDA_FLAGS = ["-O3", "-std=c++17", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall", "-Icsrc"]
CUDA_FLAGS += ["-Xfatbin=-compress-all", "--threads=0"]  # a quarter of the size; architectures compiled in parallel
# The CUDA runtime is linked statically and its symbols are hidden. The library then loads without CUDA, and shares only
# the driver with torch, which brings its own runtime, perhaps of another version.
CUDA_LINK_FLAGS = ["-lcudart_static", "-lrt", "-ldl", "-Wl,--exclude-libs,ALL"]
CUDA_ARCHS = ("80", "86", "89", "90a", "100", "120")  # as far as the toolkit supports them
OLDEST_CUDA_ARCH = 80  # bfloat16 conversions
USUAL_NVCC = "/usr/local/cuda/bin/nvcc"


class LeftOutError(Exception):
    """The reason, in one line, why a part of the library is not built."""


class Unit(NamedTuple):
    """One object file: its source below csrc/, and the compiler's command with all flags."""

    name: str
    source: str
    command: list[str]


class Part(NamedTuple):
    """One part of the library: how it is compiled and linked, and further details for the record."""

    compiler: str
    flags: list[str]
    details: dict[str, Any]
    units: list[Unit]
    link_flags: list[str]

    def record(self) -> dict[str, Any]:
        return {"built": True, "reason": None, "compiler": self.compiler, "flags": self.flags, **self.details}


def run(command: Sequence[str], what: str, show: bool = True) -> str:
    """Runs a compiler in the source tree and returns its output; raises LeftOutError if it fails."""
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
    """Returns the C++ compiler's command: CXX, or the first of the usual names that is found."""
    named = shlex.split(os.environ.get("CXX", ""))
    if named:
        return named
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name):
            return [name]
    raise LeftOutError("no C++ compiler found (looked for c++, g++ and clang++; CXX names another)")


def cpu_part(command: list[str]) -> Part:
    """Returns the CPU part: one unit for each instruction set that the target may have, and pair_loss.cpp."""
    compiler = run([*command, "--version"], "asking for the compiler's version").splitlines()[0]
    target = run([*command, "-dumpmachine"], "asking for the compiler's target").strip()
    isas = X86_ISAS if target.startswith(("x86_64", "amd64")) else {}
    flags = COMMON_FLAGS + shlex.split(os.environ.get("CXXFLAGS", ""))
    base = [*command, *flags]
    own = [f'-DSIPO_SOURCES="{build_info.sources_digest(ROOT)}"', *(["-DSIPO_X86=1"] if isas else [])]
    units = [Unit("pair_loss", "csrc/cpu/pair_loss.cpp", base + own)]
    for isa in ("portable", *isas):
        own = [f"-DSIPO_ISA={isa}", *isas.get(isa, [])]
        units.append(Unit(f"pair_kernels_{isa}", "csrc/cpu/pair_kernels.cpp", base + own))
    link_flags = LINK_FLAGS + shlex.split(os.environ.get("LDFLAGS", ""))
    return Part(compiler, flags, {"isas": ["portable", *isas]}, units, link_flags)


def find_nvcc() -> list[str]:
    """Returns nvcc's command, from CUDACXX, CUDA_HOME, CUDA_PATH, the search path or the usual place."""
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
    """Returns the architectures to compile for, oldest first: SIPO_CUDA_ARCHS, or all of CUDA_ARCHS that nvcc knows."""

    def age(arch: str) -> tuple[int, str]:
        return int(arch.rstrip("abcdef")), arch

    listed = re.findall(r"\bsm_(\d+[a-z]?)\b", run([*nvcc, "--list-gpu-code"], "asking nvcc for its architectures"))
    # nvcc does not always list sm_90a, which is sm_90 with the instructions that no later architecture has.
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
    """Returns the CUDA part: one unit for each source, with machine code for each architecture and PTX for later ones.

    Args:
        cxx: The C++ compiler's command; nvcc's host compiler if nvcc accepts it.
    """
    chosen = os.environ.get("SIPO_CUDA_ARCHS", "").strip()
    if chosen in ("0", "none"):
        raise LeftOutError(f"SIPO_CUDA_ARCHS={chosen} was set")
    nvcc = find_nvcc()
    version = run([*nvcc, "--version"], "asking for nvcc's version").splitlines()
    compiler = next((line for line in version if "release" in line), version[-1] if version else "")
    archs = cuda_archs(nvcc)
    flags = [*CUDA_FLAGS, *(f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs)]
    # PTX of compute_90a would run on sm_90a only.
    newest = archs[-1].rstrip("abcdef")
    flags.append(f"-gencode=arch=compute_{newest},code=compute_{newest}")
    host = ["-ccbin", cxx[-1]]  # without a launcher such as ccache
    try:
        run([*nvcc, *host, "-E", "-x", "cu", os.devnull], "trying the host compiler", show=False)
        flags += host
    except LeftOutError:
        pass  # It is too new for nvcc, which then chooses another.
    sources = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc" / "cuda").glob("*.cu"))
    if not sources:
        raise LeftOutError("there is no source csrc/cuda/*.cu")
    units = [Unit(f"cuda_{Path(source).stem}", source, [*nvcc, *flags]) for source in sources]
    # A dry run prints where nvcc's runtime is.
    dry_run = run([*nvcc, "-dryrun", "-x", "cu", os.devnull], "asking nvcc for its libraries", show=False)
    libraries = "".join(re.findall(r"^#\$ LIBRARIES=(.*)$", dry_run, re.MULTILINE))
    folders = [word for word in shlex.split(libraries) if word.startswith("-L")]
    return Part(compiler, flags, {"archs": archs}, units, [*folders, *CUDA_LINK_FLAGS])


def without_cpu(reason: str) -> str:
    return f"the CPU part, in the same library, is left out: {reason}"


def find_parts() -> tuple[dict[str, Part], dict[str, str]]:
    """Returns the parts that can be tried, CPU first, and why the others cannot."""
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
    """Links to another name and renames: a running process may have the old library mapped."""
    aside = target.with_name(f".{target.name}.{os.getpid()}")
    flags = [flag for part in parts for flag in part.link_flags]
    try:
        run([*find_compiler(), *objects, *flags, "-o", str(aside)], "linking")
        os.replace(aside, target)
    finally:
        aside.unlink(missing_ok=True)


def build(parts: dict[str, Part], library: Path) -> dict[str, str]:
    """Compiles all units in parallel and links the parts that compiled; returns why the others did not."""
    failed: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        # CUDA first: it takes the longest.
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
        while "cpu" in objects:  # If they do not link, the last part is left out.
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
    """Returns a digest of flags, compilers' versions, sources (in a flag of the CPU part), and what is left out."""
    nvcc_reads = [os.environ.get(name) for name in ("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS")]
    return hashlib.sha256(repr((parts, left_out, nvcc_reads)).encode()).hexdigest()


class BuildNative(build_ext):
    """Builds the shared library instead of an extension module."""

    def run(self) -> None:
        folder = ROOT / PACKAGE if self.inplace else Path(self.build_lib, PACKAGE)
        folder.mkdir(parents=True, exist_ok=True)
        library, record = folder / LIBRARY, folder / RECORD
        parts, left_out = find_parts()
        made_from = digest(parts, left_out) if parts else None
        current = made_from is not None and build_info.read_record(record).get("digest") == made_from
        if self.force or not current or not build_info.fits(library, ROOT):
            failed = build(parts, library)
            left_out |= failed
            if "cpu" in left_out:
                library.unlink(missing_ok=True)  # An earlier build's library would not fit the sources.
            info = {
                "library": None if "cpu" in left_out else LIBRARY,
                "digest": None if failed else made_from,
                "parts": {
                    name: {"built": False, "reason": left_out[name]} if name in left_out else parts[name].record()
                    for name in build_info.BACKENDS
                },
            }
            record.write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")
        for name, reason in left_out.items():
            print(f"sipo: the {build_info.BACKENDS[name]} backend is left out: {reason}", file=sys.stderr)

    def get_source_files(self) -> list[str]:
        return sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob("*") if path.is_file())

    def get_outputs(self) -> list[str]:
        return self._existing(Path(self.build_lib, PACKAGE))

    def get_output_mapping(self) -> dict[str, str]:
        in_place = self._existing(ROOT / PACKAGE) if self.inplace else []
        return {os.path.join(self.build_lib, PACKAGE, os.path.basename(path)): path for path in in_place}

    def _existing(self, folder: Path) -> list[str]:
        return [str(folder / name) for name in (LIBRARY, RECORD) if (folder / name).exists()]


class PlatformWheel(bdist_wheel):
    """Builds a wheel that is tagged for the platform if it contains the library, and for any platform if not."""

    def get_tag(self) -> tuple[str, str, str]:
        # bdist_wheel calls this after the build, and writes `root_is_pure` to the metadata later.
        library = Path(self.get_finalized_command("build_ext").build_lib, PACKAGE, LIBRARY)
        self.root_is_pure = not library.exists()
        _, _, plat = super().get_tag()
        # A universal2 Python still compiles for one architecture.
        return "py3", "none", plat.replace("universal2", platform.machine())


setup(
    ext_modules=[Extension(f"{PACKAGE}._native", sources=[])],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": PlatformWheel},
)
