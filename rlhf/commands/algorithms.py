"""`rlhf algorithms`: the methods and their choices, or the fields of one."""

from __future__ import annotations

import sys

from rlhf.config import UserError
from rlhf.config.algorithm import METHODS
from rlhf.config.reference import method_text


def print_method(name: str) -> None:
    """The fields of one method. Raises UserError: there is no such method."""
    if name not in METHODS:
        raise UserError(f"there is no built-in algorithm `{name}`. Choose one of {', '.join(METHODS)}")
    print(method_text(name, METHODS[name]), end="")


def print_methods() -> None:
    """Each method's choice at every plug point, as a table as wide as the terminal (200 columns into a file)."""
    from rich.console import Console
    from rich.table import Table

    from rlhf.algorithms import catalogue

    rows = [vars(row) for row in catalogue.rows()]
    table = Table(*rows[0], box=None, header_style="bold", pad_edge=False)
    for row in rows:
        table.add_row(*row.values())
    console = Console(width=None if sys.stdout.isatty() else 200, markup=False, highlight=False)
    console.print(table)
    console.print("\n`rlhf algorithms NAME` prints the fields of one method; your own is named by its import path.")
