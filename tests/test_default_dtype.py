"""Nothing of the package follows torch's default floating-point type, which scripts set to bfloat16 or float64."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted(path for package in ("sipo", "sipo_kernels") for path in (ROOT / package).rglob("*.py"))
# torch functions whose result has the default type unless they are told another
FLOATS = {"empty", "eye", "linspace", "logspace", "normal", "ones", "rand", "randn", "zeros"}
# those that take it from what they are given, where that is a Python float
FROM_VALUES = {"as_tensor", "full", "scalar_tensor", "tensor"}


def holds_float(node: ast.AST) -> bool:
    """Whether an expression has a float in it that can be seen: a literal, float(...) or one of math's."""
    return any(
        (isinstance(each, ast.Constant) and isinstance(each.value, float))
        or (isinstance(each, ast.Call) and isinstance(each.func, ast.Name) and each.func.id == "float")
        or (isinstance(each, ast.Attribute) and isinstance(each.value, ast.Name) and each.value.id == "math")
        for each in ast.walk(node)
    )


def calls_without_dtype(source: str) -> list[int]:
    """Lines of calls of torch's functions for new tensors that leave a floating-point type to the default."""
    lines = []
    for call in ast.walk(ast.parse(source)):
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute)):
            continue
        module, name = call.func.value, call.func.attr
        if not (isinstance(module, ast.Name) and module.id == "torch"):
            continue
        told = any(keyword.arg in ("dtype", "out", None) for keyword in call.keywords)
        if not told and (name in FLOATS or (name in FROM_VALUES and any(map(holds_float, call.args)))):
            lines.append(call.lineno)
    return lines


def test_such_calls_are_found() -> None:
    calls = ["rand(3)", "rand(3, dtype=x)", "tensor([1, 2])", "tensor([1, 2.0])", "full((2,), math.inf)", "ones(3)"]
    assert calls_without_dtype("\n".join(f"torch.{call}" for call in calls)) == [1, 4, 5, 6]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_new_tensors_have_a_type_of_their_own(path: Path) -> None:
    assert calls_without_dtype(path.read_text(encoding="utf-8")) == []
