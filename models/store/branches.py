"""The branches of a conversation, one after the other, so that each item comes once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import NamedTuple

from models.store.tree import Size


class Fork(NamedTuple):
    """Where a branch leaves an earlier one: behind the node `after`, at which None is the beginning.

    There, the earlier one goes on with the node `instead_of`, unless that is None.
    """

    after: str | None
    instead_of: str | None


class Step(NamedTuple):
    """A node, and the fork if it is the first one of a branch that is not the current one."""

    node: Size
    fork: Fork | None = None


def in_branches(nodes: Sequence[Size], leaf: str | None) -> list[Step]:
    """All nodes of a tree: first the branch to the leaf, then each other one, from its fork to its newest leaf.

    A branch comes behind the one that it leaves; the branches that leave one come in the order of their forks.
    """
    known = {node.id: node for node in nodes}
    children: dict[str | None, list[Size]] = defaultdict(list)
    for node in sorted(nodes, key=_age):
        if node.parent is None or _parent(node, known):
            children[node.parent].append(node)
    newest = _newest_below(nodes, children)
    steps = list[Step]()
    waiting: list[tuple[Fork | None, list[Size]]] = [(None, _path(known, leaf))]
    while waiting:
        fork, branch = waiting.pop()
        steps += [Step(node, None if index else fork) for index, node in enumerate(branch)]
        ids, later = [node.id for node in branch], branch[1:]
        places = zip_longest(ids, later) if fork else zip_longest([None, *ids], branch)
        for after, kept in reversed([*places]):
            for child in reversed(children[after]):
                if child is not kept:
                    leaving = Fork(after, kept and kept.id)
                    waiting.append((leaving, _descend(child, children, newest)))
    return steps


def _age(node: Size) -> tuple[float, str]:
    return node.created, node.id


def _newest_below(
    nodes: Sequence[Size], children: Mapping[str | None, Sequence[Size]]
) -> Mapping[str, tuple[float, str]]:
    """The age of the newest leaf at or below each node."""
    newest: dict[str, tuple[float, str]] = {}
    for node in sorted(nodes, key=lambda node: node.depth, reverse=True):
        below = [newest[child.id] for child in children.get(node.id, ())]
        newest[node.id] = max(below, default=_age(node))
    return newest


def _parent(node: Size, known: Mapping[str, Size]) -> Size | None:
    """The node before a node, which is one less deep, so that no wrong parent makes a path endless."""
    above = known.get(node.parent or "")
    return above if above and above.depth == node.depth - 1 else None


def _path(known: Mapping[str, Size], leaf: str | None) -> list[Size]:
    """The nodes that lead to the leaf, and the leaf."""
    path = list[Size]()
    node = known.get(leaf or "")
    while node:
        path.append(node)
        node = _parent(node, known)
    return path[::-1]


def _descend(
    node: Size, children: Mapping[str | None, Sequence[Size]], newest: Mapping[str, tuple[float, str]]
) -> list[Size]:
    """A node and those that lead to the newest leaf below it."""
    branch = [node]
    while below := children.get(branch[-1].id):
        branch.append(max(below, key=lambda child: newest[child.id]))
    return branch
