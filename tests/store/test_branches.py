from __future__ import annotations

import random
from itertools import pairwise

import pytest

from models.store.branches import Fork, Step, in_branches
from models.store.storage_limits import MAX_ITEMS
from models.store.tree import Size


def tree(*edges: str) -> list[Size]:
    """Nodes from texts such as "a>b", the parent before its child, in the order of creation; ">a" is a first one."""
    depths = {"": -1}
    nodes = []
    for created, edge in enumerate(edges):
        parent, _, id = edge.partition(">")
        depths[id] = depths[parent] + 1
        nodes.append(Size(id, parent or None, depths[id], float(created), 1))
    return nodes


def told(steps: list[Step]) -> list[str]:
    """The branches as texts: "after/instead of: nodes"."""
    lines: list[str] = []
    for node, fork in steps:
        if fork:
            lines.append(f"{fork.after}/{fork.instead_of}: ")
        elif not lines:
            lines.append("")
        lines[-1] += node.id
    return lines


@pytest.mark.parametrize(
    ("edges", "leaf", "expected"),
    [
        ([], None, []),
        ([">a", "a>b", "b>c"], "c", ["abc"]),
        ([">a", "a>b", "a>c", "a>d"], "c", ["ac", "a/c: b", "a/c: d"]),
        ([">a", ">b", "b>c"], "a", ["a", "None/a: bc"]),
        ([">a", "a>b", "b>c"], "a", ["a", "a/None: bc"]),
        ([">a", "a>b", ">c"], None, ["None/None: ab", "None/None: c"]),
        ([">a", "a>b", "b>c", "b>d", "a>e", "e>f", "e>g", "f>h"], "d", ["abd", "a/b: efh", "e/f: g", "b/d: c"]),
    ],
    ids=["empty", "one", "versions", "first", "below the leaf", "no leaf", "branches of branches"],
)
def test_each_branch_comes_after_the_one_that_it_leaves(
    edges: list[str], leaf: str | None, expected: list[str]
) -> None:
    nodes = tree(*edges)
    assert told(in_branches(nodes, leaf)) == expected
    assert told(in_branches(nodes[::-1], leaf)) == expected


def test_each_node_of_a_large_tree_comes_once_and_behind_its_parent() -> None:
    source = random.Random(7)
    for parent_of in (lambda number: number - 1, lambda number: 0, lambda number: source.randrange(number)):
        edges = [">0", *(f"{parent_of(number)}>{number}" for number in range(1, MAX_ITEMS))]
        steps = in_branches(tree(*edges), str(source.randrange(MAX_ITEMS)))
        places = {step.node.id: place for place, step in enumerate(steps)}
        assert len(steps) == len(places) == MAX_ITEMS
        assert all(places[step.node.parent or "0"] <= places[step.node.id] for step in steps)
        for before, step in pairwise(steps):
            assert step.fork or step.node.parent == before.node.id


def test_nodes_whose_parents_are_wrong_do_not_make_it_endless() -> None:
    loop = [Size("a", "b", 1, 1.0, 1), Size("b", "a", 0, 2.0, 1), Size("c", "gone", 0, 3.0, 1)]
    steps = in_branches([*loop, Size("d", None, 0, 4.0, 1)], "a")
    assert [(step.node.id, step.fork) for step in steps] == [("b", None), ("a", None), ("d", Fork(None, "b"))]
