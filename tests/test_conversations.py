from __future__ import annotations

from models.conversations import Conversation


def test_each_conversation_has_an_id_of_its_own() -> None:
    ids = {Conversation().id for _ in range(100)}
    assert len(ids) == 100
    assert all(conversation_id.startswith("conv_") and len(conversation_id) == 37 for conversation_id in ids)


def test_a_conversation_begins_empty_and_shares_its_messages_with_no_other() -> None:
    first, second = Conversation(), Conversation()
    first.messages.append({"role": "user", "content": "Hello"})
    assert (second.messages, second.busy) == ([], False)


def test_conversations_with_the_same_content_are_not_the_same() -> None:
    first, second = Conversation("conv_1"), Conversation("conv_1")
    assert first != second
    assert len({first, second}) == 2
