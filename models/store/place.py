"""Where something goes in the tree of a conversation."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """Where a turn goes: below `parent`, or at the beginning if it is None.

    If `advances` is set, the reply becomes the leaf of the conversation, provided that `leaf` still is: the leaf that
    the caller has seen. Else the turn is a branch. A conversation that is not listed always gets a new leaf. `new` says
    that the turn begins the conversation, and `listed` whether the user finds that one in lists.
    """

    parent: str | None = None
    leaf: str | None = None
    advances: bool = True
    new: bool = False
    listed: bool = True
