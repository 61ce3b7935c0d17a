"""Several hosts in one event loop, with one PostgreSQL database, and replies that a test scripts."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

from models.chat_request import ChatRequest
from models.generation.interface import NewConversation, ResponseRequest, Target
from models.generation.manager import ResponseManager
from models.hosts.host_responses import HostResponses
from models.hosts.peers import Peers
from models.options import Options
from models.settings import Settings
from models.store.conversations import Conversations
from models.store.database import open_database
from models.store.ownership import Ownership
from tests.support.cable import Cable
from tests.support.fake_client import FakeListener
from tests.support.scripted import ScriptedChat, running

KEY = b"the key of all hosts"
SECONDS = 0.5  # for a host to answer


@dataclass
class Host:
    """One host, which others reach by a cable."""

    scripted: ScriptedChat
    ownership: Ownership
    conversations: Conversations
    manager: ResponseManager
    peers: Peers
    responses: HostResponses
    cable: Cable

    @classmethod
    @asynccontextmanager
    async def opened(cls, settings: Settings, reachable: bool = True, **changes: int) -> AsyncIterator[Host]:
        """A host with some settings changed. One that is not reachable has no address."""
        async with AsyncExitStack() as stack:
            enter = stack.enter_async_context
            database = await enter(open_database(settings))
            peers = await enter(Peers.opened("127.0.0.1:0", KEY, SECONDS))
            cable = await enter(Cable.to(peers.address or ""))
            address = cable.address if reachable else None
            ownership = await enter(Ownership.taken(database, address=address))
            conversations, scripted = Conversations(database, ownership.owner.id), ScriptedChat()
            manager = await enter(running(scripted, conversations, settings, **changes))
            responses = await enter(HostResponses.opened(manager, conversations, peers))
            yield cls(scripted, ownership, conversations, manager, peers, responses, cable)

    def ask(self, message: str, target: Target | None = None, user: str = "ann") -> tuple[str, FakeListener]:
        """Ask for a reply. Returns its id, and a listener that gets its events."""
        listener = FakeListener()
        chat = ChatRequest(user, [{"role": "user", "content": message}], Options())
        request = ResponseRequest(chat, target or NewConversation("conv_1"))
        return self.responses.create(request, listener), listener
