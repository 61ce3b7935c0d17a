"""Random trees in the database, against a plain model of them in Python."""

from __future__ import annotations

import asyncio
import random
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings as hypothesis_settings, strategies
from sqlalchemy import select

from models.errors import ConversationLockedError, ResponseNotFoundError
from models.settings import Settings
from models.store.conversations import Conversations
from models.store.database import conversations_table, items_table, open_database
from models.store.item import Item, Status
from models.store.place import Place
from tests.support.trees import contents_of, ids_of, message, reply


@dataclass
class Node:
    """A node of the model. `inputs` is None for messages."""

    parent: str | None
    content: str
    status: Status | None = None
    inputs: int | None = None


@dataclass
class Tree:
    """The model of a conversation."""

    leaf: str | None = None
    nodes: dict[str, Node] = field(default_factory=dict)

    def path(self, node: str | None) -> list[str]:
        """The ids that lead to a node."""
        return [] if node is None else [*self.path(self.nodes[node].parent), node]

    def contents(self, node: str | None) -> list[str]:
        return [self.nodes[id].content for id in self.path(node)]

    def present(self, node: str | None) -> list[str]:
        """The ids that lead to a node, without the deleted ones."""
        return [id for id in self.path(node) if self.nodes[id].status is not Status.DELETED]

    def has_children(self, node: str) -> bool:
        return any(other.parent == node for other in self.nodes.values())

    def newest_below(self, node: str | None) -> str | None:
        """The newest leaf at or below a node, or of all; all nodes are equally old here, so the greatest id decides."""
        below = [id for id in self.nodes if node in (None, *self.path(id)) and not self.has_children(id)]
        return max(below, default=None)

    def delete(self, response: str) -> None:
        """Delete a response; a leaf that goes moves up, and on to the newest leaf."""
        before = self.leaf
        self.remove(response)
        if self.leaf != before:
            self.leaf = self.newest_below(self.leaf)

    def remove(self, response: str) -> None:
        """Remove a response, with what goes with it; the leaf moves up."""
        if self.has_children(response):
            self.nodes[response].status, self.nodes[response].content = Status.DELETED, ""
            if self.leaf == response:
                self.leaf = self.nodes[response].parent
            return
        node, own = response, 0
        while True:
            gone = self.nodes.pop(node)
            own = max(own - 1, 0) if gone.inputs is None else gone.inputs
            if self.leaf == node:
                self.leaf = gone.parent
            if gone.parent is None or self.has_children(gone.parent):
                return
            node = gone.parent
            if not own and self.nodes[node].status is not Status.DELETED:
                return


class RandomTree:
    """A conversation in the database and its model, to which the same random changes happen."""

    def __init__(self, store: Conversations, source: random.Random) -> None:
        self.store = store
        self.tree = Tree()
        self.id = ""
        self._source = source

    async def grow(self, steps: int) -> None:
        self.id = (await self.store.create("ann")).id
        often = [self.take_turn, self.take_turn, self.take_turn, self.end, self.end]
        changes = [*often, self.append, self.delete_response, self.delete_message, self.choose_leaf]
        for _ in range(steps):
            await self._source.choice(changes)()
            await self.check()

    def any_node(self, *kinds: bool) -> str | None:
        """Any node; only replies, or only messages, if a kind is given."""
        nodes = [id for id, node in self.tree.nodes.items() if not kinds or (node.inputs is not None) in kinds]
        return self._source.choice(nodes) if nodes else None

    @property
    def leaf_runs(self) -> bool:
        leaf = self.tree.leaf
        return leaf is not None and self.tree.nodes[leaf].status is Status.IN_PROGRESS

    async def take_turn(self) -> None:
        """Ask below any node, having seen any leaf."""
        parent, hex = self._source.choice([self.tree.leaf, self.any_node()]), uuid.uuid4().hex
        seen = self._source.choice([self.tree.leaf, self.tree.leaf, self.any_node()])
        advances = self._source.random() < 0.7
        input = [message(f"msg_{hex}{number}", f"q{hex}{number}") for number in range(self._source.randrange(3))]
        new = Item.of_reply(f"resp_{hex}", 1.0, [], status=Status.IN_PROGRESS)
        place = Place(parent, seen, advances)
        if advances and (seen != self.tree.leaf or self.leaf_runs):
            with pytest.raises(ConversationLockedError):
                await self.store.begin_turn("ann", self.id, place, input, new)
            return
        await self.store.begin_turn("ann", self.id, place, input, new)
        for item in input:
            self.tree.nodes[item.id] = Node(parent, item.content)
            parent = item.id
        self.tree.nodes[new.id] = Node(parent, "", Status.IN_PROGRESS, len(input))
        if advances:
            self.tree.leaf = new.id

    async def append(self) -> None:
        """Add messages behind the leaf."""
        items = [message(f"msg_{uuid.uuid4().hex}", f"m{number}") for number in range(self._source.randrange(3))]
        if self.leaf_runs:
            with pytest.raises(ConversationLockedError):
                await self.store.append_items("ann", self.id, items)
            return
        for item in await self.store.append_items("ann", self.id, items):
            self.tree.nodes[item.id] = Node(self.tree.leaf, item.content)
            self.tree.leaf = item.id

    async def end(self) -> None:
        """End a reply, or write it again."""
        if id := self.any_node(True):
            content = uuid.uuid4().hex
            await self.store.update_replies([reply(id, content[:3], content[3:])])
            if self.tree.nodes[id].status is not Status.DELETED:
                self.tree.nodes[id].content, self.tree.nodes[id].status = content, Status.COMPLETED

    async def delete_response(self) -> None:
        if id := self.any_node(True):
            if self.tree.nodes[id].status is Status.DELETED:
                with pytest.raises(ResponseNotFoundError):
                    await self.store.delete_response("ann", id)
                return
            await self.store.delete_response("ann", id)
            self.tree.delete(id)

    async def delete_message(self) -> None:
        if (id := self.any_node(False)) and self.tree.nodes[id].status is not Status.DELETED:
            await self.store.delete_item("ann", self.id, id)
            self.tree.nodes[id].status, self.tree.nodes[id].content = Status.DELETED, ""

    async def choose_leaf(self) -> None:
        if id := self.any_node():
            if self.leaf_runs:
                with pytest.raises(ConversationLockedError):
                    await self.store.set_leaf("ann", self.id, id)
                return
            await self.store.set_leaf("ann", self.id, id)
            self.tree.leaf = self.tree.newest_below(id)

    async def check(self) -> None:
        """The database has the same tree, by each way to read it."""
        items, leaf, exists = await self.store.path("ann", self.id)
        assert (leaf, exists) == (self.tree.leaf, True)
        assert (ids_of(items), contents_of(items)) == (self.tree.path(leaf), self.tree.contents(leaf))
        assert [item.parent for item in items] == [None, *self.tree.path(leaf)][: len(items)]
        if node := self.any_node():
            items = (await self.store.path("ann", self.id, node)).items
            assert (ids_of(items), contents_of(items)) == (self.tree.path(node), self.tree.contents(node))

    async def check_all(self) -> None:
        """The database has the same nodes, pages and lists, and counts the same bytes."""
        async with self.store._database.connect() as connection:
            chosen = select(items_table.c.id, items_table.c.bytes).where(items_table.c.conversation_id == self.id)
            sizes = {id: size for id, size in await connection.execute(chosen)}
            counted = select(conversations_table.c.bytes).where(conversations_table.c.id == self.id)
            assert (await connection.execute(counted)).scalar() == sum(sizes.values())
        assert {*sizes} == {*self.tree.nodes}
        for id in self.tree.nodes:
            assert contents_of(await self.store.branch("ann", id)) == self.tree.contents(id)
        path = self.tree.path(self.tree.leaf)
        assert await self.pages_back(self._source.randrange(1, 4)) == path
        present = self.tree.present(self.tree.leaf)
        placed = [one async for page in self.store.pages("ann", self.id) for one in page]
        assert sorted(one.item.id for one in placed) == sorted(self.tree.nodes)
        assert [one.item.id for one in placed][: len(path)] == path
        assert await self.listed(self._source.randrange(1, 4), ascending=True) == present
        assert await self.listed(self._source.randrange(1, 4), ascending=False) == present[::-1]

    async def pages_back(self, limit: int) -> list[str]:
        """The ids of the current branch, from pages of some length."""
        page = await self.store.read_page("ann", self.id, limit)
        seen = ids_of(page.items)
        while page.earlier:
            page = await self.store.read_page("ann", self.id, limit, seen[0])
            seen = [*ids_of(page.items), *seen]
        return seen

    async def listed(self, limit: int, ascending: bool) -> list[str]:
        """The ids of the items that are listed, from pages of some length."""
        seen, has_more = list[str](), True
        while has_more:
            after = seen[-1] if seen else None
            items, has_more = await self.store.list_items("ann", self.id, limit, after, ascending)
            seen += ids_of(items)
        return seen


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    """An event loop for many examples."""
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def store(runner: asyncio.Runner, shared_database: Settings) -> Iterator[Conversations]:
    opened = open_database(shared_database)
    database = runner.run(opened.__aenter__())
    yield Conversations(database)
    runner.run(opened.__aexit__(None, None, None))


@pytest.mark.slow
@hypothesis_settings(max_examples=30, deadline=None)
@given(source=strategies.randoms(use_true_random=True))
def test_a_random_tree_is_the_same_in_the_database(
    runner: asyncio.Runner, store: Conversations, source: random.Random
) -> None:
    async def check() -> None:
        tree = RandomTree(store, source)
        await tree.grow(25)
        await tree.check_all()

    runner.run(check())
