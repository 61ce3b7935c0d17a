"""Which weights of its children the code of a module reads itself, so that no other module can take their places."""

from __future__ import annotations

import ast
import inspect
import textwrap

from torch import nn
from transformers import PreTrainedModel


def children_read(kind: type[nn.Module]) -> frozenset[str]:
    """The names of children whose `weight` a class reads: Mamba multiplies by that of `dt_proj`.

    What is read in training only does not count, nor does a dtype or a device.
    """
    reader = _Reader()
    for base in kind.__mro__[: kind.__mro__.index(nn.Module)]:
        if base is PreTrainedModel:
            break
        try:
            reader.visit(ast.parse(textwrap.dedent(inspect.getsource(base))))
        except (OSError, TypeError, SyntaxError):  # a class without a source
            continue
    return frozenset(reader.names)


class _Reader(ast.NodeVisitor):
    """Collects the names in expressions like `self.name.weight`."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    def visit_If(self, node: ast.If) -> None:
        in_training = any(isinstance(part, ast.Attribute) and part.attr == "training" for part in ast.walk(node.test))
        for statement in node.orelse if in_training else [node.test, *node.body, *node.orelse]:
            self.visit(statement)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        match node:
            case ast.Attribute(value=ast.Attribute(attr="weight"), attr="dtype" | "device"):
                return
            case ast.Attribute(value=ast.Attribute(value=ast.Name(id="self"), attr=name), attr="weight"):
                self.names.add(name)
        self.generic_visit(node)
