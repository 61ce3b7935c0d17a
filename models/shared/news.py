"""Which conversations have changed, as hosts tell each other."""

from __future__ import annotations

from collections.abc import Callable


class News:
    """Tells the other hosts of changes. A host that is alone has nobody to tell.

    `on_news` is called with each change on another host: the user, the conversation, and whether it was deleted. A
    change may come twice, and later than others.
    """

    def __init__(self) -> None:
        self.on_news: Callable[[str, str, bool], None] = lambda user, conversation, deleted: None

    def tell(self, user: str, conversation: str, deleted: bool) -> None:
        """Tell the other hosts soon that a conversation has changed, in the database."""
