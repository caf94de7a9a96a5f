"""Sources with one fault each, which the tests of the tests must notice. What is replaced is found by its syntax.

A mutant names a file, a function, and a pattern in which $A stands for any expression and $$$A for any number of them.
So a variable, a parameter or a field can be renamed, and lines be broken elsewhere. Where a pattern matches more places
than the mutant says, or fewer, the source has changed, and the mutant must follow: an error says so.
"""

from __future__ import annotations

import importlib
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from ast_grep_py import SgNode, SgRoot

METAVARIABLE = re.compile(r"\$(?:\$\$)?([A-Z]+)")
# Macros that the C++ parser would take for names of types.
MACROS = re.compile(r"\b(__launch_bounds__\([^)]*\)|__[a-z_]+__|ELBO_(INLINE|UNROLL))")


@dataclass(frozen=True)
class Mutant:
    file: str  # in the folder of sources
    function: str  # the name of all functions that are searched; "" for the whole file
    pattern: str  # an expression or a statement
    replacement: str  # "" leaves a statement out
    killer: Any = None  # what is known to notice it, which is tried first
    place: tuple[int, int] = (0, 1)  # which match it is, counted from 0, and how many there are
    beside: str = ""  # a pattern that matches once in the function; the replacement may use its metavariables too


@dataclass(frozen=True)
class Edit:
    """What takes the place of a source's characters from `begin` to `end`."""

    begin: int
    end: int
    text: str
    is_statement: bool


def language_of(file: str) -> str:
    return "python" if file.endswith(".py") else "cpp"


@cache
def pattern_of(pattern: str, language: str) -> Any:
    """Gives a pattern as ast-grep takes it. `$A < $B ? …` alone would begin a C++ template, so it is given a place."""
    if language == "python" or pattern.endswith(";") or pattern.startswith("for "):
        return pattern
    context = f"void f() {{ return {pattern}; }}"
    returned = SgRoot(METAVARIABLE.sub(r"\1", context), language).root().find(kind="return_statement")
    return {"context": context, "selector": returned.child(1).kind()}  # type: ignore[union-attr]


@cache
def parsed(text: str, language: str) -> SgNode:
    """Its characters are where they are in the text."""
    return SgRoot(MACROS.sub(lambda m: " " * len(m[0]), text) if language == "cpp" else text, language).root()


def name_of(function: SgNode) -> str | None:
    """Finds a definition's name. A C++ declarator, which may be of a reference or a pointer, has another inside."""
    if (name := function.field("name")) is not None:
        return name.text()
    names = function.field("declarator")
    while names is not None and names.kind() not in ("identifier", "field_identifier"):
        names = names.field("declarator") or next(iter(reversed(names.named_children())), None)
    return names.text() if names is not None else None


def find(text: str, mutant: Mutant) -> Edit:
    language = language_of(mutant.file)
    root = parsed(text, language)
    scopes = [root]
    if mutant.function:
        scopes = [f for f in root.find_all(kind="function_definition") if name_of(f) == mutant.function]

    def matches(pattern: str) -> list[SgNode]:
        return [m for scope in scopes for m in scope.find_all(pattern=pattern_of(pattern, language))]

    where = f"in {mutant.function or 'the whole'} of {mutant.file}, whose code has changed"
    found, (which, expected) = matches(mutant.pattern), mutant.place
    assert len(found) == expected, f"{mutant.pattern!r} matches {len(found)} times, not {expected}, {where}"
    bound = [found[which]]
    if mutant.beside:
        bound += matches(mutant.beside)
        assert len(bound) == 2, f"{mutant.beside!r} matches {len(bound) - 1} times, not once, {where}"

    def text_of(metavariable: re.Match[str]) -> str:
        for node in bound:
            nodes = [m] if (m := node.get_match(metavariable[1])) else node.get_multiple_matches(metavariable[1])
            if nodes:
                return text[nodes[0].range().start.index : nodes[-1].range().end.index]
        raise AssertionError(f"{metavariable[0]} of {mutant.replacement!r} is in no pattern")

    span = found[which].range()
    return Edit(
        span.start.index,
        span.end.index,
        METAVARIABLE.sub(text_of, mutant.replacement),
        found[which].kind().endswith("statement"),
    )


def mutated(text: str, mutant: Mutant) -> str:
    edit = find(text, mutant)
    return text[: edit.begin] + edit.text + text[edit.end :]


def copy(source: Path, folder: Path, *mutants: Mutant) -> Path:
    """A copy of a folder of sources, each of whose mutants replaces something."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("__pycache__"))
    for mutant in mutants:
        path = folder / mutant.file
        path.write_text(mutated(path.read_text(encoding="utf-8"), mutant), encoding="utf-8")
    return folder


def switch_in(folder: Path, mutants: Mapping[str, Mutant], switch: str) -> dict[str, int]:
    """Writes all of them into the C++ sources of a folder, and returns their numbers: where the expression `switch` has
    one's number, that one runs, and for 0 none."""
    numbers = {name: number for number, name in enumerate(mutants, 1)}
    for file in {mutant.file for mutant in mutants.values()}:
        path = folder / file
        text = path.read_text(encoding="utf-8")
        edits = []
        for name, mutant in mutants.items():
            if mutant.file == file:
                try:
                    edits.append((f"{switch} == {numbers[name]}", find(text, mutant)))
                except AssertionError as error:
                    raise AssertionError(f"{name}: {error}") from None
        edits.sort(key=lambda edit: (edit[1].begin, -edit[1].end))
        path.write_text(_switched(text, 0, len(text), edits), encoding="utf-8")
    return numbers


def _switched(text: str, begin: int, end: int, edits: list[tuple[str, Edit]]) -> str:
    """The text from `begin` to `end`, where each edit has its condition. One may lie in another, or at its place."""
    parts = []
    while edits:
        (condition, edit), *edits = edits
        inner = [e for e in edits if e[1].begin < edit.end]
        assert all(e[1].end <= edit.end for e in inner), "two mutants overlap, and neither lies in the other"
        edits = edits[len(inner) :]
        original = _switched(text, edit.begin, edit.end, inner)
        if edit.is_statement:
            choice = f"{{ if ({condition}) {{ {edit.text} }} else {original} }}"
        else:
            choice = f"({condition} ? ({edit.text}) : ({original}))"
        parts += [text[begin : edit.begin], choice]
        begin = edit.end
    return "".join([*parts, text[begin:end]])


def imported(
    source: Path, module: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., ModuleType]]:
    """A fixture's value: imports a module of a copy of the package `source`, with some mutants."""
    monkeypatch.syspath_prepend(folder)

    def of(*mutants: Mutant) -> ModuleType:
        copy(source, folder / "mutated_kernels", *mutants)
        return importlib.import_module(f"mutated_kernels.{module}")

    yield of
    for name in [m for m in sys.modules if m.partition(".")[0] == "mutated_kernels"]:
        del sys.modules[name]
