"""How the messages of a chat are laid out as text: by the server alone, whatever stands in them.

The layout is that of the conversations in the training text (``data.notebook``): a line that one says, a line that the
other answers, a blank line. A message is one line: every line break inside it is read as a space, so that no content
can end a turn or begin another. Content and layout are encoded apart, so that the ids of a content are the same in
every role.
"""

import re
from collections.abc import Sequence
from typing import Final, Literal, NamedTuple, TypeAlias

from meristem.data.tokenizer import Tokenizer

Role: TypeAlias = Literal["system", "developer", "user", "assistant"]

END_OF_REPLY: Final = "\n\n"
"""A blank line: what ends a reply, and is read after one that was broken off."""

ENDS: Final[dict[Role, str]] = {"system": "\n\n", "developer": "\n\n", "user": "\n", "assistant": END_OF_REPLY}

# What Python counts as the end of a line, and a reader might.
_BREAKS: Final = re.compile("[\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029]+")


class Message(NamedTuple):
    """What somebody said."""

    role: Role
    content: str


def content_ids(tokenizer: Tokenizer, content: str) -> list[int]:
    """The ids of a content, in whatever role."""
    return tokenizer.encode(_BREAKS.sub(" ", content))


def message_ids(tokenizer: Tokenizer, messages: Sequence[Message], *, is_open: bool = False) -> list[int]:
    """The ids of a conversation, after which a reply can be written.

    is_open: the reply before was broken off, so that what ends it comes first.
    """
    ids = tokenizer.encode(END_OF_REPLY) if is_open and messages else []
    for message in messages:
        ids += [*content_ids(tokenizer, message.content), *tokenizer.encode(ENDS[message.role])]
    return ids
