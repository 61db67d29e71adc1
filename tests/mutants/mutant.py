"""What can be turned wrong in one place of a source file, and how it is put in.

A mutant is one comparison turned, one condition dropped, one `and` made an `or`, one refusal taken
out or one answer negated.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_TURNED: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Lt: ast.GtE,
    ast.GtE: ast.Lt,
    ast.Gt: ast.LtE,
    ast.LtE: ast.Gt,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
}


@dataclass(frozen=True)
class Mutant:
    """`text` replaces the bytes of `file` (relative to the checkout) from `start` to `end`; `what`
    says in words what is wrong then. `name` stays the same while the line's text does."""

    file: str
    line: int
    what: str
    start: int
    end: int
    text: str
    name: str

    def applied(self, source: bytes) -> bytes:
        return source[: self.start] + self.text.encode() + source[self.end :]


def mutants_of(root: Path, path: Path) -> Iterator[Mutant]:
    """Every mutant of one file, in the order of its lines."""
    source = path.read_text(encoding="utf-8")
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line.encode()))
    file = str(path.relative_to(root))
    seen: dict[str, int] = {}

    def mutant(node: ast.expr | ast.stmt, what: str, text: str) -> Mutant:
        assert node.end_lineno is not None and node.end_col_offset is not None
        start = starts[node.lineno - 1] + node.col_offset
        end = starts[node.end_lineno - 1] + node.end_col_offset
        seen[what] = seen.get(what, 0) + 1
        return Mutant(file, node.lineno, what, start, end, text, f"{file} {what} #{seen[what]}")

    for node in _code(ast.parse(source)):
        if isinstance(node, ast.Compare) and len(node.ops) == 1:
            turned = ast.Compare(node.left, [_TURNED[type(node.ops[0])]()], node.comparators)
            yield mutant(node, f"turned: {ast.unparse(node)}", f"({ast.unparse(turned)})")
        elif isinstance(node, ast.BoolOp):
            other = ast.And() if isinstance(node.op, ast.Or) else ast.Or()
            text = ast.unparse(ast.BoolOp(other, node.values))
            yield mutant(node, f"and/or: {ast.unparse(node)}", f"({text})")
        elif isinstance(node, ast.If | ast.IfExp):
            yield mutant(node.test, f"never: {ast.unparse(node.test)}", "False")
            yield mutant(node.test, f"always: {ast.unparse(node.test)}", "True")
        elif isinstance(node, ast.Raise) and node.exc is not None:
            yield mutant(node, f"no longer raised: {ast.unparse(node)[:60]}", "pass")
        elif isinstance(node, ast.Return) and isinstance(node.value, ast.Compare | ast.BoolOp):
            text = f"return not ({ast.unparse(node.value)})"
            yield mutant(node, f"negated: {ast.unparse(node)}", text)


def _code(tree: ast.Module) -> Iterator[ast.AST]:
    """All nodes but those that only a type checker sees, and those inside f-strings, whose places
    Python 3.11 does not know."""
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.JoinedStr):
            continue
        yield node
        pending += reversed(list(ast.iter_child_nodes(node)))
