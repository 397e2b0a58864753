"""The command line: what it prints, what it refuses, and what it manages without."""

from __future__ import annotations

import argparse
import ast
import importlib.metadata
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

import sipo
import sipo_kernels
from sipo import cli
from sipo_kernels import backends, build_info


def run(*arguments: str, prelude: str = "") -> subprocess.CompletedProcess[str]:
    """``sipo`` in a process of its own, after some lines of Python."""
    code = f"import sys\n{prelude}\nfrom sipo.cli import main\nsys.exit(main(sys.argv[1:]))"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=Path(__file__).parents[1],
        check=False,
    )


def without(*modules: str) -> str:
    """Lines of Python after which some packages are not installed, as far as imports can tell."""
    return f"sys.modules.update(dict.fromkeys({modules!r}))"


def test_version_by_module_and_by_function(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"sipo {sipo.__version__}\n"
    module = subprocess.run(
        [sys.executable, "-m", "sipo", "--version"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
        check=True,
    )
    assert module.stdout == f"sipo {sipo.__version__}\n"


def test_importing_the_command_line_imports_nothing_heavy_but_torch() -> None:
    names = ("diffusers", "accelerate", "sklearn", "matplotlib", "tensorboard")
    prelude = f"import sipo.cli; print([n for n in {names!r} if n in sys.modules])"
    assert run("--version", prelude=prelude).stdout == f"[]\nsipo {sipo.__version__}\n"


def test_doctor_lists_versions_devices_and_every_backend(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"sipo {sipo.__version__}"
    facts = {line[:16].strip(): line[16:].strip() for line in lines[1:]}
    assert facts["torch"] == torch.__version__
    assert facts["python"].startswith(".".join(map(str, sys.version_info[:3])))
    assert facts["cpu"].startswith(f"{torch.get_num_threads()} threads")
    for device, status in backends.statuses():
        line = facts[f"{device} {status.name}"]
        if status.available:
            assert line == f"runs ({status.reason})"
        else:
            assert line == f"cannot run: {status.reason}; {status.remedy}"
    assert facts["cpu eager"] == "runs (plain torch, any device)"


def test_doctor_says_what_the_library_was_built_for(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def library() -> list[str]:
        assert cli.main(["doctor"]) == 0
        lines = capsys.readouterr().out.splitlines()
        return lines[lines.index("native library") + 1 : lines.index("backends")]

    def part(name: str) -> dict[str, Any]:
        return parts[name]

    monkeypatch.setattr(build_info, "part", part)
    cpu = {"built": True, "reason": None, "compiler": "g++ 12", "flags": [], "isas": ["portable", "avx2"]}
    cuda = {"built": True, "reason": None, "compiler": "CUDA 13.0", "flags": [], "archs": ["80", "90a"]}
    parts = {"cpu": cpu, "cuda": cuda}
    assert library() == [
        "  cpu part      for portable, avx2, by g++ 12",
        "  cuda part     for sm_80, sm_90a, by CUDA 13.0",
    ]
    parts["cuda"] = {"built": False, "reason": "no nvcc", "remedy": "install the CUDA toolkit"}
    assert library()[1] == "  cuda part     left out: no nvcc; install the CUDA toolkit"


def test_doctor_names_reason_and_remedy_of_what_cannot_run() -> None:
    # This process may run Triton's interpreter; that one may not.
    prelude = "import os; os.environ.pop('TRITON_INTERPRET', None); os.environ['CUDA_VISIBLE_DEVICES'] = ''"
    result = run("doctor", prelude=prelude)
    assert result.returncode == 0
    line = next(line for line in result.stdout.splitlines() if line.strip().startswith("cpu triton"))
    assert "cannot run: " in line
    assert "TRITON_INTERPRET=1" in line or "sipo[triton]" in line


def test_doctor_works_without_the_optional_packages(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name in ("diffusers", "scikit-learn"):
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "  diffusers     not installed: pip install 'sipo[train]'\n" in out
    assert "  scikit-learn  not installed: pip install 'sipo[demo]'\n" in out
    result = run("doctor", prelude=without("diffusers", "accelerate", "sklearn", "matplotlib", "safetensors", "tqdm"))
    assert result.returncode == 0 and "cpu eager" in result.stdout


def test_doctor_reports_a_backend_that_fails_when_it_is_used(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import sipo_kernels

    broken = Mock(side_effect=RuntimeError("no C compiler\nand a long story"))
    monkeypatch.setattr(sipo_kernels, "pair_loss", broken)
    assert cli.main(["doctor"]) == 0
    assert "  cpu eager     cannot run: RuntimeError: no C compiler\n" in capsys.readouterr().out


def test_the_demo_says_which_packages_it_lacks() -> None:
    result = run("demo", prelude=without("diffusers", "sklearn"))
    assert result.returncode == 2
    assert result.stderr == "sipo: error: the demo needs diffusers, scikit-learn: pip install 'sipo[demo]'\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["train"], "the following arguments are required: config\n"),
        (["dance"], "argument COMMAND: invalid choice: 'dance'"),
        (["demo", "--method", "ppo"], "argument --method: invalid choice: 'ppo'"),
        (["demo", "--steps", "many"], "argument --steps: invalid int value: 'many'"),
        (["demo", "--steps", "0"], "steps=0: expected at least 1"),
        (["demo", "--beta", "nan"], "beta=nan: expected a finite number > 0"),
        (["demo", "--samples", "7"], "samples=7: expected a positive multiple of 10"),
        (["demo", "--output", __file__], "output="),
    ],
)
def test_user_errors_are_one_line_and_status_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status: Any = cli.main(arguments)
    except SystemExit as caught:
        status = caught.code
    printed = capsys.readouterr()
    assert status == 2 and printed.out == ""
    assert printed.err.startswith(f"sipo: error: {message}") and printed.err.count("\n") == 1


def test_a_backend_that_cannot_run_stops_the_demo_before_it_starts(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SIPO_BACKEND", "warp")
    assert cli.main(["demo"]) == 2
    assert "sipo: error: SIPO_BACKEND='warp': expected one of auto" in capsys.readouterr().err


def test_demo_options_reach_the_demo_and_its_errors_the_user(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("diffusers")
    from sipo.demo import main as demo
    from sipo.training import TrainingDivergedError

    seen: list[demo.DemoConfig] = []
    problems: list[Exception] = []

    def stand_in(config: demo.DemoConfig) -> dict[str, Any]:
        seen.append(config)
        if problems:
            raise problems.pop()
        return {}

    monkeypatch.setattr(demo, "run_demo", stand_in)
    monkeypatch.setattr(demo, "describe", lambda summary, output: f"all is well in {output}")
    arguments = "demo --method diffusion_dpo --beta 20 --steps 7 --batch-size 4 --learning-rate 1e-4 --samples 20"
    assert cli.main([*arguments.split(), "--seed", "9", "--output", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"all is well in {tmp_path}\n"
    assert cli.main(["demo"]) == 0
    assert seen == [demo.DemoConfig(tmp_path, "diffusion_dpo", 20.0, 7, 4, 1e-4, 20, 9), demo.DemoConfig()]
    for problem in (TrainingDivergedError("step 3: it broke"), OSError(28, "No space left on device")):
        problems.append(problem)
        capsys.readouterr()
        assert cli.main(["demo"]) == 2
        assert capsys.readouterr().err == f"sipo: error: {problem}\n"


def test_our_warnings_are_one_line_and_those_of_others_are_as_they_were(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from sipo.demo import main as demo
    from sipo.training import TrainingWarning

    def stand_in(config: demo.DemoConfig) -> dict[str, Any]:
        warnings.warn("step 40: drift: the policy\n has left the data", TrainingWarning, stacklevel=1)
        warnings.warn("the native backend is not used", backends.BackendWarning, stacklevel=1)
        warnings.warn("somebody else's", FutureWarning, stacklevel=1)
        return {}

    monkeypatch.setattr(demo, "run_demo", stand_in)
    monkeypatch.setattr(demo, "describe", lambda summary, output: "")
    before = warnings.showwarning
    with pytest.warns(FutureWarning, match="somebody else's"):
        assert cli.main(["demo", "--output", str(tmp_path)]) == 0
        assert capsys.readouterr().err.splitlines() == [
            "sipo: warning: step 40: drift: the policy has left the data",
            "sipo: warning: the native backend is not used",
        ]
    assert warnings.showwarning is before


def test_every_warning_of_ours_has_a_category_of_ours() -> None:
    """By which the command line knows them; plain ones would come with a path and a line of source."""
    found = []
    packages = [Path(package.__file__).parent for package in (sipo, sipo_kernels)]
    for path in (path for package in packages for path in package.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "warnings.warn":
                found.append(ast.unparse(node.args[1]) if len(node.args) > 1 else f"none, {path}:{node.lineno}")
    assert len(found) >= 5 and set(found) <= {
        "BackendWarning",
        "ConfigWarning",
        "ConnectionWarning",
        "LockWarning",
        "LogWarning",
        "PromptWarning",
        "TrainingWarning",
    }


def test_a_train_that_is_refused_prints_the_refusal_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("yaml")
    pytest.importorskip("accelerate")
    (tmp_path / "metrics.jsonl").write_text("{}\n", encoding="utf-8")
    toy = Path(__file__).parents[1] / "examples" / "toy" / "sd15.yaml"
    paths = [f"training.output_dir={tmp_path}", f"data.cache={tmp_path / 'cache'}"]
    assert cli.main(["train", str(toy), *paths, "training.report_to=none"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("sipo: error: training.output_dir=") and printed.err.count("\n") == 1


def _options(parser: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.Action]]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _options(command)
        else:
            yield parser.prog, action


def test_the_help_of_an_option_is_a_whole_phrase() -> None:
    options = list(_options(cli._parser()))
    assert len(options) > 60
    for command, action in options:
        text = action.help or ""
        fragment = re.match(r"(of|that|between|at|by|where|to) ", text)
        assert len(text.split()) > 1 and fragment is None, f"{command} {action.dest}: {text!r}"
