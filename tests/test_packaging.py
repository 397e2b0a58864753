"""The package as people install it: what wheels hold, what a build does without a compiler, what imports."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from disassembly import build_script
from packaging.version import Version

import sipo
from sipo_kernels import build_info

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = "sipo_kernels/_native.dylib" if sys.platform == "darwin" else "sipo_kernels/_native.so"
RECORD = "sipo_kernels/_build_info.json"
NO_COMPILER = "no-such-compiler"
CUDA_SWITCHES = ("SIPO_CUDA_ARCHS", "CUDACXX", "CUDA_HOME", "CUDA_PATH", "NVCC_")

needs_compiler = pytest.mark.skipif(
    not (os.environ.get("CXX") or any(map(shutil.which, ("c++", "g++", "clang++")))),
    reason="the native library needs a C++ compiler",
)


def no_nvcc() -> str | None:
    """Why there is no nvcc, or ``None``."""
    try:
        build_script().find_nvcc()
    except build_script().LeftOutError as why:
        return str(why)
    return None


def project_files() -> list[Path]:
    """The project's own files, relative to its root: what git tracks or would; without git, all not made."""
    listing = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, text=True
    )
    if listing.returncode == 0:
        files = [Path(name) for name in listing.stdout.split("\0") if name]
    else:
        made = re.compile(
            r"(^|/)(\.[^/]*|build|dist|out|runs|__pycache__|[^/]*\.egg-info|_native\..*|_build_info.*)(/|$)"
        )
        files = [path.relative_to(ROOT) for path in ROOT.rglob("*")]
        files = [path for path in files if not made.search(path.as_posix())]
    return sorted(path for path in files if (ROOT / path).is_file())


def clean_env(**changes: str) -> dict[str, str]:
    """The environment without what would change how the package behaves, or what a ``make`` in a test does."""
    drop = ("SIPO_", "PYTHONPATH", "TRITON_", "CXXFLAGS", "LDFLAGS", "MAKE", "MFLAGS", "VENV", "PINS", *CUDA_SWITCHES)
    return {**{name: value for name, value in os.environ.items() if not name.startswith(drop)}, **changes}


def run(*command: object, cwd: Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=env or clean_env(), capture_output=True, text=True
    )
    assert done.returncode == 0, f"{command} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done


def copy_tree(target: Path) -> Path:
    for path in project_files():
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / path, target / path)
    return target


def build_wheel(tree: Path, target: Path, **env: str) -> zipfile.ZipFile:
    """`pip wheel` in build isolation; returns the only wheel it made."""
    run(sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--wheel-dir", target, cwd=tree, env=clean_env(**env))
    (wheel,) = target.glob("*.whl")
    return zipfile.ZipFile(wheel)


def install(wheel: zipfile.ZipFile, folder: Path) -> Path:
    """A fresh virtual environment with the wheel in it, and with this environment's torch behind it.

    A plain line in a .pth file appends a folder to the path and reads no .pth files there, so an editable
    install of the package in this environment stays out of sight.
    """
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python]
    run(*pip, "install", "--no-deps", "--no-index", wheel.filename, cwd=folder.parent)
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).stdout.strip()
    behind = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    Path(site, "behind.pth").write_text("\n".join(behind) + "\n")
    return python


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_tree(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def native_wheel(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Without optimisation, and with the CUDA part, where there is nvcc, for one architecture: that takes long enough.

    The optimised library is the one that all other tests run.
    """
    chosen = {name: value for name, value in os.environ.items() if name.startswith(CUDA_SWITCHES)}
    quick = {"CXXFLAGS": "-O0", "SIPO_CUDA_ARCHS": "80"}
    return build_wheel(tree, tmp_path_factory.mktemp("native"), **{**quick, **chosen})


@pytest.fixture(scope="module")
def plain_wheel(tree: Path, native_wheel: zipfile.ZipFile, tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Built without a compiler, after the other and in the same tree: nothing of that may be left in it."""
    return build_wheel(tree, tmp_path_factory.mktemp("plain"), CXX=NO_COMPILER)


@pytest.fixture(scope="module")
def example() -> tuple[str, str]:
    """The program of docs/math.md §9, and what the page says that it prints."""
    page = (ROOT / "docs" / "math.md").read_text(encoding="utf-8")
    (program,), (printed,) = (re.findall(rf"```{kind}\n(.*?)```", page, re.DOTALL) for kind in ("python", "text"))
    return program, printed


def metadata(wheel: zipfile.ZipFile, name: str) -> str:
    return wheel.read(f"sipo-{sipo.__version__}.dist-info/{name}").decode()


# --- wheels -------------------------------------------------------------------------------------------------


@needs_compiler
def test_wheel_with_library(native_wheel: zipfile.ZipFile) -> None:
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    names = set(native_wheel.namelist())
    if sys.platform.startswith("linux"):
        assert Path(str(native_wheel.filename)).name == f"sipo-{sipo.__version__}-py3-none-{platform}.whl"
    assert "Root-Is-Purelib: false" in metadata(native_wheel, "WHEEL")
    assert LIBRARY in names
    record = json.loads(native_wheel.read(RECORD))
    assert record["library"] == Path(LIBRARY).name
    assert record["parts"]["cpu"]["built"] and record["parts"]["cpu"]["reason"] is None
    assert "portable" in record["parts"]["cpu"]["isas"]

    wanted = {
        path.as_posix()
        for path in project_files()
        if path.parts[0] in ("sipo", "sipo_kernels") and path.suffix in (".py", ".json", ".safetensors", ".typed")
    }
    assert {"sipo/py.typed", "sipo_kernels/py.typed"} <= wanted
    assert any(name.startswith("sipo/demo/base/") and name.endswith(".safetensors") for name in wanted)
    assert wanted <= names
    assert {name.split("/")[0] for name in names} == {"sipo", "sipo_kernels", f"sipo-{sipo.__version__}.dist-info"}
    assert names - wanted == {LIBRARY, RECORD} | {name for name in names if ".dist-info/" in name}


@needs_compiler
@pytest.mark.skipif(no_nvcc() is not None, reason=f"building the CUDA part: {no_nvcc()}")
@pytest.mark.skipif(os.environ.get("SIPO_CUDA_ARCHS") in ("0", "none"), reason="SIPO_CUDA_ARCHS leaves CUDA out")
def test_wheel_with_cuda_part(native_wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    """It keeps CUDA's runtime to itself and needs none, so that it loads anywhere and beside any torch."""
    cuda = json.loads(native_wheel.read(RECORD))["parts"]["cuda"]
    assert cuda["built"], cuda["reason"]
    assert "release" in cuda["compiler"] and cuda["archs"]
    library = native_wheel.extract(LIBRARY, tmp_path)
    program = f"import torch, ctypes; print(ctypes.CDLL({library!r}).sipo_cuda_description() != 0)"
    assert run(sys.executable, "-c", program, cwd=tmp_path).stdout == "True\n"
    if not (shutil.which("nm") and shutil.which("readelf")):
        pytest.skip("reading a library needs nm and readelf (they are in binutils)")
    exported = run("nm", "-D", "--defined-only", "-P", library, cwd=tmp_path).stdout.splitlines()
    # Templates of the C++ library are weak in every library that has them.
    names = {line.split()[0] for line in exported if not line.startswith("_ZNSt") and " W " not in line}
    assert "sipo_cuda_pair_loss" in names and all(name.startswith("sipo_") for name in names)
    needed = re.findall(r"NEEDED.*\[(.*)\]", run("readelf", "-d", library, cwd=tmp_path).stdout)
    assert needed and not [name for name in needed if "cuda" in name]


@needs_compiler
def test_wheel_metadata(native_wheel: zipfile.ZipFile) -> None:
    lines = metadata(native_wheel, "METADATA").splitlines()
    assert f"Version: {sipo.__version__}" in lines
    assert "License-Expression: Apache-2.0" in lines
    assert "Requires-Python: >=3.10" in lines
    required = [line for line in lines if line.startswith("Requires-Dist") and "extra ==" not in line]
    assert required == ["Requires-Dist: torch>=2.9", "Requires-Dist: numpy>=2"]
    assert "sipo = sipo.cli:main" in metadata(native_wheel, "entry_points.txt")


@needs_compiler
def test_installed_wheel_runs_native(native_wheel: zipfile.ZipFile, example: tuple[str, str], tmp_path: Path) -> None:
    python = install(native_wheel, tmp_path / "venv")
    program, printed = example
    assert run(python, "-I", "-c", program, cwd=tmp_path).stdout == printed
    shown = run(
        python,
        "-I",
        "-c",
        "import sipo, sipo_kernels.backends as b; print(sipo.__file__, b.__file__, sep='\\n')\n"
        "import torch; print(b.choose('auto', torch.device('cpu')))\n"
        + program.replace("ratio_scale=ratio_scale", "ratio_scale=ratio_scale, backend='native'"),
        cwd=tmp_path,
    ).stdout.splitlines()
    assert [Path(path).is_relative_to(tmp_path / "venv") for path in shown[:2]] == [True, True]
    assert shown[2] == "native"
    assert shown[3:] == printed.splitlines()


@needs_compiler
def test_wheel_without_compiler(plain_wheel: zipfile.ZipFile, example: tuple[str, str], tmp_path: Path) -> None:
    assert Path(str(plain_wheel.filename)).name == f"sipo-{sipo.__version__}-py3-none-any.whl"
    assert "Root-Is-Purelib: true" in metadata(plain_wheel, "WHEEL")
    assert LIBRARY not in plain_wheel.namelist()
    parts = json.loads(plain_wheel.read(RECORD))["parts"]
    reason = parts["cpu"]["reason"]
    assert not parts["cuda"]["built"] and reason in parts["cuda"]["reason"]
    assert NO_COMPILER in reason and "\n" not in reason

    python = install(plain_wheel, tmp_path / "venv")
    program, printed = example
    assert run(python, "-I", "-c", program, cwd=tmp_path).stdout == printed
    shown = run(
        python,
        "-I",
        "-c",
        "import torch, sipo_kernels.backends as b; print(b.choose('auto', torch.device('cpu')))\n"
        "try: b.choose('native', torch.device('cpu'))\n"
        "except RuntimeError as error: print(error)",
        cwd=tmp_path,
    ).stdout.splitlines()
    assert shown[0] == "eager"
    assert len(shown) == 2 and reason in shown[1]


# --- setup.py, with compilers that only write down what they were asked -------------------------------------

FAKE_COMPILER = """#!/bin/sh
case "$1" in
  --version) echo "fake 1.0"; exit 0;;
  -dumpmachine) echo "$FAKE_TARGET"; exit 0;;
esac
echo "$@" >> "$FAKE_LOG"
case "$*" in *"$FAKE_FAIL"*) [ -z "$FAKE_FAIL" ] || { echo "x.cpp:1:2: error: as asked" >&2; exit 1; };; esac
made="$* $(cat $(echo "$*" | grep -o '/[^ ]*[.]o ') /dev/null)"  # the digest of the sources is in the arguments
while [ "$1" != "-o" ]; do shift; done
echo "$made" > "$2"
"""


FAKE_NVCC = """#!/bin/sh
case " $* " in
  " --version ") echo "fake nvcc"; echo "Cuda compilation tools, release $FAKE_CUDA, V$FAKE_CUDA.1"; exit;;
  " --list-gpu-code ") printf 'sm_%s\\n' $FAKE_CODES; exit;;
  *" -dryrun "*) echo '#$ LIBRARIES=  "-L/toolkit/lib/stubs" "-L/tool kit/lib"' >&2; exit;;
  *" -E "*) [ -z "$FAKE_HOST_TOO_NEW" ]; exit;;
esac
echo "nvcc $@" >> "$FAKE_LOG"
case "$*" in *"$FAKE_NVCC_FAIL"*) [ -z "$FAKE_NVCC_FAIL" ] || {
  echo "In file included from here:" >&2; echo "x.cu(1): error: as asked" >&2; exit 1
};; esac
while [ "$1" != "-o" ]; do shift; done
echo made > "$2"
"""
BUILD = (sys.executable, "setup.py", "-q", "build_ext", "--inplace")
CODES = "75 80 86 87 88 89 90 100 103 120 121"


class FakeBuild:
    """A source tree with what setup.py reads alone, and `build_ext --inplace` in it."""

    def __init__(self, folder: Path) -> None:
        self.tree, self.log, self.compiler = folder / "tree", folder / "log", folder / "fake-c++"
        self.nvcc = folder / "toolkit" / "bin" / "nvcc"
        for path in project_files():
            if path.parts[0] == "csrc" or path.name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
                (self.tree / path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(ROOT / path, self.tree / path)
        for package in ("sipo", "sipo_kernels"):
            (self.tree / package).mkdir()
            (self.tree / package / "__init__.py").write_text('__version__ = "0"\n')
        shutil.copyfile(build_info.__file__, self.tree / "sipo_kernels" / "build_info.py")
        self.nvcc.parent.mkdir(parents=True)
        for compiler, program in ((self.compiler, FAKE_COMPILER), (self.nvcc, FAKE_NVCC)):
            compiler.write_text(program)
            compiler.chmod(0o755)

    def cuda(self, **env: str) -> list[str]:
        """Builds with nvcc as well, and returns the compilers' calls."""
        fake = {"CUDA_HOME": str(self.nvcc.parents[1]), "FAKE_CUDA": "13.0", "FAKE_CODES": CODES}
        return self(**{**fake, "SIPO_CUDA_ARCHS": "", **env})  # type: ignore[arg-type]

    def __call__(
        self, target: str = "x86_64-linux-gnu", fail: str = "", command: Sequence[str] = BUILD, **env: str
    ) -> list[str]:
        """Builds, without CUDA unless `env` changes that, and returns the compiler's calls."""
        self.log.write_text("")
        fake = {
            "CXX": str(self.compiler),
            "FAKE_TARGET": target,
            "FAKE_FAIL": fail,
            "FAKE_LOG": str(self.log),
            "SIPO_CUDA_ARCHS": "none",
        }
        done = run(*command, cwd=self.tree, env=clean_env(**{**fake, **env}))
        self.said = done.stderr.splitlines()
        self.record = json.loads((self.tree / RECORD).read_text(encoding="utf-8"))
        self.built = (self.tree / LIBRARY).exists()
        return self.log.read_text().splitlines()


@pytest.fixture
def build(tmp_path: Path) -> FakeBuild:
    return FakeBuild(tmp_path)


def test_build_compiles_each_instruction_set(build: FakeBuild) -> None:
    calls = build(CXXFLAGS="-DUSERS -g", LDFLAGS="-Lusers")
    kernels = [call for call in calls if "pair_kernels.cpp" in call]
    (dispatcher,) = (call for call in calls if "pair_loss.cpp" in call)
    assert len(calls) == 5 and "-Lusers" in calls[-1] and calls[-1].count(".o") >= 4
    assert all("-DUSERS -g" in call and "-Icsrc" in call for call in calls[:-1])
    assert "-DSIPO_X86=1" in dispatcher
    flags = {re.search(r"-DSIPO_ISA=(\w+)", call)[1]: call for call in kernels}  # type: ignore[index]
    assert set(flags) == {"portable", "avx2", "avx512"}
    assert "-mavx" not in flags["portable"]
    assert "-mavx2" in flags["avx2"] and "-mavx512" not in flags["avx2"]
    assert "-mavx512f" in flags["avx512"]
    assert build.built and build.record["parts"]["cpu"]["isas"] == ["portable", "avx2", "avx512"]


def test_build_for_another_processor_is_portable(build: FakeBuild) -> None:
    calls = build(target="aarch64-linux-gnu")
    assert len(calls) == 3
    assert not any("-mavx" in call or "SIPO_X86" in call for call in calls)
    assert build.record["parts"]["cpu"]["isas"] == ["portable"]


def test_build_again_only_when_something_changed(build: FakeBuild) -> None:
    assert len(build()) == 5
    assert build() == []
    with (build.tree / "csrc" / "pair_math.h").open("a") as header:
        header.write("// changed\n")
    assert len(build()) == 5
    assert len(build(CXXFLAGS="-O2")) == 5
    (build.tree / LIBRARY).unlink()
    assert len(build(CXXFLAGS="-O2")) == 5
    (build.tree / "csrc" / "emulation" / "emulate.h").write_text("// not part of the library\n")
    assert build(CXXFLAGS="-O2") == []


def other_library(build: FakeBuild) -> bytes:
    """Builds from sources that are changed back afterwards, and returns that library."""
    header = build.tree / "csrc" / "pair_math.h"
    sources = header.read_text()
    header.write_text(sources + "// changed\n")
    build()
    header.write_text(sources)
    return (build.tree / LIBRARY).read_bytes()


def test_build_again_when_the_library_was_exchanged(build: FakeBuild) -> None:
    other = other_library(build)
    assert len(build()) == 5 and build() == []
    (build.tree / LIBRARY).write_bytes(other)
    assert len(build()) == 5
    assert (build.tree / LIBRARY).read_bytes() != other


FAKE_PYTHON = """#!/bin/sh
case "$2" in pip) shift $#; set -- setup.py -q build_ext --inplace;; esac
exec {python} "$@"
"""


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_setup_mends_a_library_that_was_deleted_or_exchanged(build: FakeBuild) -> None:
    """Whatever the times of the files say: the stamp of the installation is newer than all of them."""
    other = other_library(build)
    for name in ("Makefile", "constraints.txt"):
        shutil.copyfile(ROOT / name, build.tree / name)
    python = build.tree / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(FAKE_PYTHON.format(python=sys.executable))
    python.chmod(0o755)
    library = build.tree / LIBRARY

    def make() -> int:
        return len(build(command=["make", "setup"]))

    assert make() == 5 and make() == 0
    library.unlink()
    assert make() == 5 and make() == 0
    library.write_bytes(other)
    os.utime(library, (0, 0))
    assert make() == 5 and make() == 0
    (build.tree / RECORD).unlink()
    assert make() == 5 and make() == 0
    with (build.tree / "csrc" / "pair_math.h").open("a") as header:
        header.write("// changed\n")
    assert make() == 5 and make() == 0


@pytest.mark.parametrize(
    ("env", "reason"),
    [
        ({"fail": "avx512"}, "pair_kernels_avx512: {cxx} failed (x.cpp:1:2: error: as asked)"),
        ({"fail": "-shared"}, "linking: {cxx} failed (x.cpp:1:2: error: as asked)"),
        ({"SIPO_SKIP_NATIVE": "1"}, "SIPO_SKIP_NATIVE was set"),
        (
            {"CXX": NO_COMPILER},
            f"asking for the compiler's version: cannot run '{NO_COMPILER}' (No such file or directory)",
        ),
    ],
)
def test_build_without_library_says_why(build: FakeBuild, env: dict[str, str], reason: str) -> None:
    build()
    with (build.tree / "csrc" / "pair_math.h").open("a") as header:
        header.write("// changed\n")
    build.cuda(**env)
    reason = reason.format(cxx=build.compiler)
    assert build.record == {
        "library": None,
        "digest": None,
        "parts": {
            "cpu": {"built": False, "reason": reason},
            "cuda": {"built": False, "reason": f"the CPU part, in the same library, is left out: {reason}"},
        },
    }
    assert f"sipo: the native CPU backend is left out: {reason}" in build.said
    assert not build.built  # what the first build made does not fit these sources
    assert list((build.tree / "sipo_kernels").glob("*_native*")) == []


def machine_code(call: str) -> list[str]:
    return re.findall(r"-gencode=arch=compute_\w+,code=(\w+)", call)


def test_build_adds_the_cuda_part(build: FakeBuild) -> None:
    calls = build.cuda(LDFLAGS="-Lusers")
    sources = [path for path in (build.tree / "csrc" / "cuda").iterdir() if path.suffix == ".cu"]
    nvcc = [call for call in calls if call.startswith("nvcc ")]
    assert len(nvcc) == len(sources) >= 1 and len(calls) == 5 + len(nvcc)
    for call in nvcc:
        assert machine_code(call) == ["sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_120", "compute_120"]
        assert "-O3 -std=c++17 -Xcompiler=-fPIC,-fvisibility=hidden" in call and "fast" not in call
        assert f"-ccbin {build.compiler} " in call
    link = calls[-1]
    assert link.count(".o ") == len(calls) - 1 and "-shared" in link and "-Lusers" in link
    assert "-L/tool kit/lib -lcudart_static" in link and "-Wl,--exclude-libs,ALL" in link

    cuda = build.record["parts"]["cuda"]
    assert build.built and build.record["library"] == Path(LIBRARY).name
    assert (cuda["built"], cuda["reason"]) == (True, None)
    assert cuda["compiler"] == "Cuda compilation tools, release 13.0, V13.0.1"
    assert cuda["archs"] == ["80", "86", "89", "90a", "100", "120"]
    assert " ".join(cuda["flags"]) in nvcc[0]
    assert not any("left out" in line for line in build.said)


@pytest.mark.parametrize(
    ("wanted", "codes", "expected"),
    [
        ("", "70 75 80 86", "sm_80 sm_86 compute_86"),
        ("", "80 86 87 89 90 90a", "sm_80 sm_86 sm_89 sm_90a compute_90"),  # PTX of 90a would run on that alone
        ("80;90a", CODES, "sm_80 sm_90a compute_90"),
        ("100, 80", CODES, "sm_80 sm_100 compute_100"),
        (" 87 87 ", CODES, "sm_87 compute_87"),
    ],
)
def test_build_for_these_gpus(build: FakeBuild, wanted: str, codes: str, expected: str) -> None:
    calls = build.cuda(SIPO_CUDA_ARCHS=wanted, FAKE_CODES=codes)
    assert machine_code(" ".join(calls)) == expected.split()
    assert build.record["parts"]["cuda"]["archs"] == [code[3:] for code in expected.split() if code.startswith("sm_")]


def test_build_takes_nvccs_own_host_compiler_where_it_refuses_ours(build: FakeBuild) -> None:
    calls = build.cuda(FAKE_HOST_TOO_NEW="1")
    assert build.record["parts"]["cuda"]["built"] and not any("-ccbin" in call for call in calls)
    launched = build.cuda(CXX=f"env {build.compiler}")
    assert any(call.startswith("nvcc ") and f"-ccbin {build.compiler} " in call for call in launched)


@pytest.mark.parametrize(
    ("env", "reason"),
    [
        ({"SIPO_CUDA_ARCHS": "none"}, "SIPO_CUDA_ARCHS=none was set"),
        ({"SIPO_CUDA_ARCHS": "0"}, "SIPO_CUDA_ARCHS=0 was set"),
        ({"SIPO_CUDA_ARCHS": "80;75"}, "SIPO_CUDA_ARCHS: '75' is none of {known} (or 'none')"),
        ({"SIPO_CUDA_ARCHS": "fast"}, "SIPO_CUDA_ARCHS: 'fast' is none of {known} (or 'none')"),
        (
            {"SIPO_CUDA_ARCHS": "100", "FAKE_CODES": "80 90"},
            "SIPO_CUDA_ARCHS: '100' is none of 80, 90, 90a (or 'none')",
        ),
        ({"FAKE_CODES": "50 70"}, "this nvcc compiles for none of 80, 86, 89, 90a, 100, 120"),
        (
            {"CUDACXX": NO_COMPILER},
            f"asking for nvcc's version: cannot run '{NO_COMPILER}' (No such file or directory)",
        ),
        ({"FAKE_NVCC_FAIL": "pair_loss.cu"}, "cuda_pair_loss: {nvcc} failed (x.cu(1): error: as asked)"),
        ({"fail": "-lcudart_static"}, "linking: {cxx} failed (x.cpp:1:2: error: as asked)"),
    ],
)
def test_build_without_cuda_says_why(build: FakeBuild, env: dict[str, str], reason: str) -> None:
    calls = build.cuda(**env)
    known = ", ".join(CODES.replace("75 ", "").replace("90 ", "90 90a ").split())
    reason = reason.format(known=known, nvcc=build.nvcc, cxx=build.compiler)
    assert build.built and build.record["library"] == Path(LIBRARY).name
    assert build.record["parts"]["cpu"]["built"]
    assert build.record["parts"]["cuda"] == {"built": False, "reason": reason}
    assert [line for line in build.said if line.startswith("sipo: ")] == [
        f"sipo: the CUDA backend is left out: {reason}"
    ]
    assert "-shared" in calls[-1] and "cudart" not in calls[-1] and "cuda_pair_loss.o" not in calls[-1]


def test_build_again_when_cuda_changed(build: FakeBuild) -> None:
    def compiled(**env: str) -> bool:
        return bool(build.cuda(**env))

    assert compiled(CUDACXX=NO_COMPILER)
    assert not compiled(CUDACXX=NO_COMPILER)
    assert "sipo: the CUDA backend is left out" in build.said[-1]  # also where there is nothing to do
    assert compiled()  # nvcc was installed since
    assert not compiled()
    assert compiled(FAKE_CUDA="13.1")
    assert compiled(SIPO_CUDA_ARCHS="80")
    assert compiled(SIPO_CUDA_ARCHS="80", NVCC_APPEND_FLAGS="-lineinfo")
    with (build.tree / "csrc" / "cuda" / "pair_loss.cu").open("a") as source:
        source.write("// changed\n")
    assert compiled()
    # What failed may have failed for want of memory, or of a header that is there the next time.
    assert compiled(FAKE_NVCC_FAIL="pair_loss.cu", SIPO_CUDA_ARCHS="80")
    assert compiled(SIPO_CUDA_ARCHS="80") and build.record["parts"]["cuda"]["built"]


def test_nvcc_is_looked_for_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = build_script()
    usual = tmp_path / "usual"
    monkeypatch.setattr(script, "USUAL_NVCC", str(usual / "bin" / "nvcc"))
    for name in CUDA_SWITCHES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    with pytest.raises(script.LeftOutError, match=r"^no CUDA compiler found \(looked for nvcc in CUDACXX, .*"):
        script.find_nvcc()
    # From the last resort to the first choice: each comes before those that are there already.
    for name in ("usual/bin", "path", "CUDA_PATH/bin", "CUDA_HOME/bin"):
        nvcc = tmp_path / name / "nvcc"
        nvcc.parent.mkdir(parents=True)
        nvcc.touch(0o755)
        if name.startswith("CUDA"):
            monkeypatch.setenv(nvcc.parents[1].name, str(nvcc.parents[1]))
        assert script.find_nvcc() == [str(nvcc)]
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "empty"))
    assert script.find_nvcc() == [str(tmp_path / "CUDA_PATH" / "bin" / "nvcc")]
    monkeypatch.setenv("CUDACXX", "ccache mine")
    assert script.find_nvcc() == ["ccache", "mine"]


# --- the record, as the package reads it --------------------------------------------------------------------


def test_the_record_is_read_with_remedies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = tmp_path / "record.json"
    monkeypatch.setattr(build_info, "RECORD", record)

    def parts(cpu: str | None, cuda: str | None) -> list[dict[str, object]]:
        """What is read where the parts are left out for these reasons."""
        written = {"cpu": {"built": cpu is None, "reason": cpu}, "cuda": {"built": cuda is None, "reason": cuda}}
        record.write_text(json.dumps({"parts": written}))
        return [build_info.part(name) for name in ("cpu", "cuda")]

    install = "then reinstall: pip install ."
    assert parts(None, None) == [{"built": True, "reason": None}] * 2
    cpu, cuda = parts(None, "no nvcc")
    assert cpu["built"] and cuda["remedy"] == f"install the CUDA toolkit, {install}"
    cpu, cuda = parts("no c++", "no library")
    assert cpu["remedy"] == cuda["remedy"] == f"install a C++ compiler, {install}"
    cpu, cuda = parts(None, "SIPO_CUDA_ARCHS=none was set")
    assert cuda["remedy"] == f"change that, {install}"
    record.write_text('{"parts": {"cpu": {"built": true}}}')
    assert build_info.part("cuda")["reason"] == "the build knew of no such part"
    not_built = {"built": False, "reason": "the package was not built", "remedy": "reinstall: pip install ."}
    for broken in ("{", "[]", '{"parts": null}', '{"parts": {"cpu": {}, "cuda": 3}}'):
        record.write_text(broken)
        assert build_info.part("cuda") == not_built
    record.unlink()
    assert build_info.part("cpu") == not_built


def test_the_record_prints_what_was_left_out(build: FakeBuild) -> None:
    build.cuda(SIPO_CUDA_ARCHS="none")
    script = build.tree / "sipo_kernels" / "build_info.py"
    shown = run(sys.executable, "-I", script, cwd=build.tree).stdout
    assert shown == "sipo: the CUDA backend is left out: SIPO_CUDA_ARCHS=none was set\n"
    build.cuda()
    assert run(sys.executable, "-I", script, cwd=build.tree).stdout == ""
    (build.tree / LIBRARY).write_text("another library")
    done = subprocess.run([sys.executable, "-I", script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "sipo: the native library does not fit the sources in csrc/\n")


# --- what the source tree imports and names -----------------------------------------------------------------

OPTIONAL = ("accelerate", "diffusers", "matplotlib", "numpy", "peft", "safetensors", "scipy", "sklearn")
OPTIONAL += ("tensorboard", "tqdm", "transformers", "triton")


def without(*packages: str) -> str:
    """A first line for a program that makes these packages look as if they were not installed."""
    return f"import sys; sys.modules.update(dict.fromkeys({packages!r}))\n"


def test_kernels_need_torch_alone_and_a_checkout(example: tuple[str, str], tmp_path: Path) -> None:
    program, printed = example
    env = clean_env(PYTHONPATH=str(ROOT), PYTHONWARNINGS="ignore")
    done = run(sys.executable, "-c", without(*OPTIONAL, "sipo") + program, cwd=tmp_path, env=env)
    assert done.stdout == printed


def test_core_needs_torch_alone(tmp_path: Path) -> None:
    program = """
import torch, sipo, sipo_kernels.reference
schedule = sipo.NoiseSchedule.flow(shift=3.0)
print(f"{schedule.ratio_scale(sigmas=torch.tensor([0.5])).item():.6g}")
same = torch.ones(2, 3, 4, 4)
print(f"{sipo.SIPOLoss(schedule)(same, same, same, sigmas=torch.tensor([0.5, 0.5])).loss.item():.6g}")
"""
    env = clean_env(PYTHONPATH=str(ROOT), PYTHONWARNINGS="ignore")
    shown = run(sys.executable, "-c", without(*OPTIONAL) + program, cwd=tmp_path, env=env).stdout
    assert shown.split() == ["0.0306658", "0.693147"]  # tests/golden/ratio_scale.json, and ln 2


def test_floors_are_the_lowest_versions_that_are_tested() -> None:
    """Each floor of pyproject.toml is pinned in constraints-lowest.txt, and met by constraints.txt."""
    floors = dict(re.findall(r'"([\w-]+)>=([\w.]+)', (ROOT / "pyproject.toml").read_text(encoding="utf-8")))
    lowest, tested = (
        re.findall(r"^([\w-]+)==([\w.]+)", (ROOT / name).read_text(encoding="utf-8"), re.M)
        for name in ("constraints-lowest.txt", "constraints.txt")
    )
    assert len(floors) == len(lowest) > 20 and dict(lowest).keys() == floors.keys()
    apart = {name for name, pin in lowest if Version(pin) != Version(floors[name])}
    assert apart == {"torch", "triton", "pyarrow"}  # of which that file says so
    for name, pin in [*lowest, *tested]:
        assert Version(pin) >= Version(floors.get(name, "0")), name
    assert floors.keys() <= dict(tested).keys()


def test_files_name_no_machine() -> None:
    place = re.compile(
        r"(?:^|[^\w.])/(?:work|root|home|opt|farm|Users)/\w|\b(?:pypi|pythonhosted|npmjs)\.(?:org|com)\b"
    )
    named = []
    for path in project_files():
        try:
            text = (ROOT / path).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # weights and pictures
        named += [f"{path}: {found[0]}" for found in place.finditer(text)]
    assert named == []


def test_every_package_that_is_imported_is_declared() -> None:
    """Not only brought along by another, which may stop doing so."""
    imported: dict[str, Path] = {}
    for path in [*ROOT.glob("sipo/**/*.py"), *ROOT.glob("sipo_kernels/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names = [node.module]
            imported |= {name.partition(".")[0]: path for name in names}
    other_names = {"PIL": "pillow", "sklearn": "scikit-learn", "yaml": "pyyaml"}
    # An error asks for bitsandbytes. Who reports to wandb has it. typing_extensions, which torch requires, is for type
    # checkers.
    undeclared = {"bitsandbytes", "typing_extensions", "wandb"}
    own = {*sys.stdlib_module_names, "sipo", "sipo_kernels", *undeclared}
    needed = {other_names.get(name, name).replace("_", "-") for name in imported.keys() - own}
    declared = set(re.findall(r'"([a-z-]+)>=[0-9.]+[";]', (ROOT / "pyproject.toml").read_text(encoding="utf-8")))
    assert needed - declared == set() and len(needed) > 15
