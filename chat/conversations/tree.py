"""A conversation as a tree of messages.

Each message follows another one; two that follow the same are branches: an answer written again, a
question asked in another way, answers of several models to one question. One branch is shown, the
one that ends with `Conversation.leaf`. A message whose row names no parent follows the one that
was written before it (conversations of a single branch need no more), unless it starts anew.
"""

from __future__ import annotations

from collections import defaultdict

from chat.models import Conversation


class Tree:
    """The shape of a conversation, in one query: ids only."""

    def __init__(self, conversation: Conversation):
        self.parent: dict[int, int | None] = {}
        self.children: dict[int | None, list[int]] = defaultdict(list)
        rows = conversation.messages.order_by("id").values_list("pk", "parent_id", "starts_anew")
        before = None
        for pk, parent, starts_anew in rows:
            follows = None if starts_anew else parent or before
            self.parent[pk] = follows
            self.children[follows].append(pk)
            before = pk
        leaf = conversation.leaf_id
        self.leaf: int | None = leaf if leaf in self.parent else before

    def path(self, leaf: int | None = None) -> list[int]:
        """Ids from the first message to `leaf`; None: the branch that is shown."""
        found: list[int] = []
        at = self.leaf if leaf is None else leaf
        while at is not None:
            found.append(at)
            at = self.parent[at]
        return found[::-1]

    def siblings(self, pk: int) -> list[int]:
        """The branches at `pk`, itself among them, oldest first."""
        return self.children[self.parent[pk]]

    def newest_below(self, pk: int) -> int:
        """Where the branch through `pk` ends, always taking the one begun last."""
        while self.children.get(pk):
            pk = self.children[pk][-1]
        return pk


def show(conversation: Conversation, message: int) -> None:
    """Makes the branch through the message of that id the one that is shown and gone on with."""
    leaf = Tree(conversation).newest_below(message)
    Conversation.objects.filter(pk=conversation.pk).update(leaf=leaf)  # `updated_at` stays
    conversation.leaf_id = leaf
