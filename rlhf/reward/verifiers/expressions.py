"""Reads what a response says as a value or as a formula, never as code.

Scorers of packages evaluate answers as Python (`eval`, SymPy's `parse_expr`), so an answer could be a program that decides its own
score and all later ones. `seal` gives a package's modules the functions of this module in their place. Knows nothing of scores.
"""

from __future__ import annotations

import ast
import sys
from functools import cache
from types import ModuleType
from typing import Any

import sympy
from sympy.parsing import sympy_parser

MOST_CHARACTERS = 100_000

_ARITHMETIC = (ast.Expression, ast.BinOp, ast.UnaryOp, ast.operator, ast.unaryop, ast.Constant, ast.Load)
_CONTAINERS = (ast.List, ast.Tuple, ast.Set, ast.Dict)
_FORMULAS = (ast.Name, ast.Call)

FUNCTIONS = """
Abs Add Ci E Ei Float Function I Integer LambertW Max Min Mod Mul Pow Rational Si Symbol acos acosh acot acoth acsc asec asech asin
asinh atan atan2 atanh binomial cbrt ceiling cos cosh cot coth csc csch erf erfc erfi exp expint factorial factorial2 floor gamma ln
li log oo pi polylog root sec sech sign sin sinh sqrt tan tanh zoo
""".split()
"""SymPy's names that a formula may use; every other name is a symbol, or a function without a meaning."""


class NotAllowed(ValueError):
    """It is code, or it is no expression at all."""


def value(text: Any, *_: Any) -> Any:
    """For `eval`: numbers, texts, lists, tuples, sets and dictionaries of them, and arithmetic.

    Raises:
        NotAllowed: anything else.
    """
    _check(text, (*_ARITHMETIC, *_CONTAINERS))
    return eval(text.strip(), {"__builtins__": {}})


def formula(
    text: str,
    local_dict: dict[str, Any] | None = None,
    transformations: Any = sympy_parser.standard_transformations,
    global_dict: dict[str, Any] | None = None,
    evaluate: bool = True,
) -> Any:
    """For SymPy's `parse_expr`: arithmetic with names, and functions of `FUNCTIONS`.

    Raises:
        NotAllowed: anything else.
    """
    _check(text, (*_ARITHMETIC, *_FORMULAS))
    return sympy_parser.parse_expr(text, local_dict, transformations, dict(_names()), evaluate)


@cache
def _names() -> dict[str, Any]:
    return {name: getattr(sympy, name) for name in FUNCTIONS} | {"__builtins__": {}, "max": sympy.Max, "min": sympy.Min}


def _check(text: Any, allowed: tuple[type[ast.AST], ...]) -> None:
    if not isinstance(text, str) or len(text) > MOST_CHARACTERS:
        raise NotAllowed("not a text, or too long a one")
    try:
        nodes = list(ast.walk(ast.parse(text.strip(), mode="eval")))
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        raise NotAllowed(f"not an expression: {error}") from None
    for node in nodes:
        good = isinstance(node, allowed)
        if isinstance(node, ast.Constant) and ast.List not in allowed:
            good = isinstance(node.value, int | float | complex)
        elif isinstance(node, ast.Name):
            good = good and not node.id.startswith("_")
        elif isinstance(node, ast.Call):
            good = good and isinstance(node.func, ast.Name) and not node.keywords
        if not good:
            raise NotAllowed(f"{type(node).__name__} is not allowed in an expression")


@cache
def seal(package: str) -> None:
    """In all modules of a package that have been imported, `eval` and `parse_expr` become `value` and `formula`."""
    ours = ModuleType("sympy")
    vars(ours).update({**vars(sympy), "parse_expr": formula})
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == package and module is not None:
            vars(module).update(eval=value)
            for attribute, held in list(vars(module).items()):
                if held is sympy_parser.parse_expr:
                    setattr(module, attribute, formula)
                elif held is sympy:
                    setattr(module, attribute, ours)
