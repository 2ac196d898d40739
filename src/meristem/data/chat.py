"""How the messages of a chat are laid out as ids: by the template of the tokenizer, or as the generated text has them.

The layout of the generated text (``data.notebook``) is a line that one says, a line that the other answers, a blank
line. A message is one line: every line break inside it is read as a space, so that no content can end a turn or begin
another. Content and layout are encoded apart, so that the ids of a content are the same in every role.

A template is Jinja, as ``transformers`` has it, in a sandbox. What it writes is cut at its special tokens; what stands
in a content is text and nothing else, also where it looks like one of these.
"""

import re
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, Final, Literal, NamedTuple, TypeAlias, cast, get_args

import numpy as np
import orjson
from jinja2 import TemplateError, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from meristem.data.config import TokenizerConfig
from meristem.data.tokenizer import Tokenizer
from meristem.errors import DataError, WrongValue

Role: TypeAlias = Literal["system", "developer", "user", "assistant"]

END_OF_REPLY: Final = "\n\n"
"""A blank line: what ends a reply without a template, and is read after one that was broken off."""

ENDS: Final[dict[Role, str]] = {"system": "\n\n", "developer": "\n\n", "user": "\n", "assistant": END_OF_REPLY}

# What Python counts as the end of a line, and a reader might.
_BREAKS: Final = re.compile("[\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029]+")
_MARKS: Final = re.compile(r"<\|[^|<>\s]+\|>|</?s>|<(?:start|end)_of_[a-z]+>|<\uff5c[^\uff5c<>]+\uff5c>")
"""What special tokens of a chat look like."""

_COMMENT: Final = re.compile(r"\{#.*?#\}", re.DOTALL)
_PRIVATE: Final = 0xF0000
"""The first character of those that Unicode leaves to whoever uses them."""


class Message(NamedTuple):
    """What somebody said."""

    role: Role
    content: str


def messages_of(value: object) -> tuple[Message, ...]:
    """The messages that a JSON value holds. Raises ValueError, with the reason, where it holds none."""
    if not isinstance(value, list) or not value:
        raise ValueError(f"{'an empty list' if value == [] else f'a {type(value).__name__}'}, expected messages")
    for number, each in enumerate(value, 1):
        if not isinstance(each, dict) or each.keys() != {"role", "content"}:
            raise ValueError(f"message {number} has not the keys role and content alone")
        if each["role"] not in get_args(Role):
            raise ValueError(f"message {number} has the role {each['role']!r}, expected {', '.join(get_args(Role))}")
        if not isinstance(each["content"], str):
            raise ValueError(f"the content of message {number} is a {type(each['content']).__name__}, no text")
    return tuple(Message(each["role"], each["content"]) for each in value)


def as_json(messages: Sequence[Message]) -> bytes:
    """The messages as a JSON text, of which ``messages_of`` makes them again."""
    return orjson.dumps([each._asdict() for each in messages])


def content_ids(tokenizer: Tokenizer, content: str) -> list[int]:
    """The ids of a content, in whatever role, where there is no template."""
    return tokenizer.encode(_BREAKS.sub(" ", content))


def conversation_ids(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """The ids of a conversation that is over, as a document to train on."""
    if tokenizer.chat_template is not None:
        return _ids(tokenizer, _layout(tokenizer), messages, asks=False)
    end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    return [*message_ids(tokenizer, messages), *end]


def message_ids(
    tokenizer: Tokenizer, messages: Sequence[Message], *, is_first: bool = True, is_open: bool = False
) -> list[int]:
    """The ids of messages, after which a reply can be written.

    is_first: they begin a conversation, rather than go on after a reply. is_open: that reply was broken off, so that
    what ends it comes first.
    """
    if not messages:
        return []
    if tokenizer.chat_template is not None:
        layout = _layout(tokenizer)
        if is_first:
            return _ids(tokenizer, layout, messages, asks=True)
        return _ids_after_reply(tokenizer, layout, messages)[0 if is_open else 1 :]
    ids = tokenizer.encode(END_OF_REPLY) if is_open else []
    for message in messages:
        ids += [*content_ids(tokenizer, message.content), *tokenizer.encode(ENDS[message.role])]
    return tokenizer.begin(ids) if is_first else ids


def ends_of(tokenizer: Tokenizer) -> frozenset[int]:
    """The ids that end what is written: the end of a document, and of a turn where a template has one."""
    ends = set() if tokenizer.eos_id is None else {tokenizer.eos_id}
    if tokenizer.chat_template is not None:
        ends.add(tokenizer.special[_layout(tokenizer).end])
    return frozenset(ends)


def require_usable(tokenizer: TokenizerConfig | Tokenizer, template: str | None, *, is_chat: bool) -> None:
    """DataError where a chat template cannot be used with a tokenizer, before a text is read.

    template: the content of the file that the settings name.
    """
    if isinstance(tokenizer, Tokenizer):
        if template is not None or is_chat:
            ends_of(tokenizer)
    elif template is not None:
        _read(template, frozenset(tokenizer.special_tokens), tokenizer.bos_token or None, tokenizer.eos_token or None)


def encode_documents(tokenizer: Tokenizer, texts: Sequence[bytes]) -> list[np.ndarray]:
    """The ids of chats, each given as JSON."""
    return [np.array(conversation_ids(tokenizer, messages_in(text)), dtype=np.uint32) for text in texts]


def messages_in(text: bytes) -> tuple[Message, ...]:
    """The messages of a chat that is given as JSON."""
    try:
        return messages_of(orjson.loads(text))
    except ValueError as cause:
        raise DataError(
            f"data.format=chat reads JSON lines of messages, and the source holds something else: {cause}. Leave "
            f"data.format out."
        ) from cause


class _Layout(NamedTuple):
    """A template that was read and tried. end: the special token after a reply. special: those of the tokenizer."""

    render: Callable[[Sequence[Message], bool], str]
    special: re.Pattern[str] | None
    end: str


def _layout(tokenizer: Tokenizer) -> _Layout:
    name_of = {token_id: name for name, token_id in tokenizer.special.items()}
    bos, eos = (None if token_id is None else name_of[token_id] for token_id in (tokenizer.bos_id, tokenizer.eos_id))
    return _read(cast(str, tokenizer.chat_template), frozenset(tokenizer.special), bos, eos)


@lru_cache(maxsize=16)
def _read(template: str, special: frozenset[str], bos: str | None, eos: str | None) -> _Layout:
    """The layout of a template, tried on a conversation."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    tokens = {name: text for name, text in (("bos_token", bos), ("eos_token", eos)) if text is not None}
    try:
        wanted = meta.find_undeclared_variables(environment.parse(template))
        compiled = environment.from_string(template)
    except TemplateError as cause:
        raise DataError(
            f"the chat template is no Jinja: {cause}. Give another with tokenizer.chat_template."
        ) from cause
    lacking = sorted(name for name in wanted if name.endswith("_token") and name not in tokens)
    lacking += sorted(set(_MARKS.findall(_COMMENT.sub("", template))) - special)

    def render(messages: Sequence[Message], asks: bool) -> str:
        said = [each._asdict() for each in messages]
        try:
            return compiled.render(messages=said, add_generation_prompt=asks, **tokens)
        except Exception as cause:
            raise WrongValue(
                f"the chat template of this model does not take these messages: {cause}", key="messages"
            ) from cause

    if not lacking:
        reply = chr(_PRIVATE)
        tried = render([Message("user", "a"), Message("assistant", reply), Message("user", "b")], True)
        lacking = sorted(set(_MARKS.findall(tried)) - special)
        after = tried.partition(reply)[2]
    if lacking:
        raise DataError(
            f"the chat template needs {', '.join(lacking)}, and the tokenizer has "
            f"{', '.join(sorted(special)) or 'no special token'}. Add it with tokenizer.special_tokens, name it with "
            f"tokenizer.bos_token or tokenizer.eos_token, or give another template with tokenizer.chat_template.",
            found=lacking,
        )
    pattern = "|".join(re.escape(name) for name in sorted(special, key=lambda name: (-len(name), name)))
    cut = re.compile(f"({pattern})") if pattern else None
    end = cut.search(after) if cut else None
    if end is None or after[: end.start()].strip():
        raise DataError(
            "the chat template puts no special token right after a reply, so nothing would end one. Give another with "
            "tokenizer.chat_template."
        )
    return _Layout(render, cut, end[0])


def _to_json(value: Any, indent: int | None = None) -> str:
    return orjson.dumps(value, option=orjson.OPT_INDENT_2 if indent else None).decode()


def _refuse(message: str) -> None:
    raise TemplateError(message)


def _ids(tokenizer: Tokenizer, layout: _Layout, messages: Sequence[Message], *, asks: bool) -> list[int]:
    hidden, names, _ = _hidden(messages, tokenizer.special)
    return list(_encoded(tokenizer, layout, layout.render(hidden, asks), names))


def _ids_after_reply(tokenizer: Tokenizer, layout: _Layout, messages: Sequence[Message]) -> list[int]:
    """What stands between a reply and the next, the token that ends the reply first."""
    hidden, names, reply = _hidden(messages, tokenizer.special)
    before = [Message("user", "a"), Message("assistant", reply)]
    _, found, rest = layout.render([*before, *hidden], True).partition(reply)
    if not found:
        raise WrongValue("the chat template of this model leaves out replies, so no session can go on.", key="session")
    return list(_encoded(tokenizer, layout, rest.lstrip() if rest.lstrip().startswith(layout.end) else rest, names))


def _hidden(messages: Sequence[Message], special: Collection[str]) -> tuple[list[Message], Mapping[str, str], str]:
    """The messages with private characters in place of what looks like special tokens, what each stands for, and one
    more that no message has."""
    contents = "".join(message.content for message in messages)
    present = sorted((name for name in special if name in contents), key=lambda name: (-len(name), name))
    free = (chr(number) for number in range(_PRIVATE, sys.maxunicode) if chr(number) not in contents)
    names = {next(free): name for name in present}
    hidden = []
    for message in messages:
        content = message.content
        for character, name in names.items():
            content = content.replace(name, character)
        hidden.append(Message(message.role, content))
    return hidden, names, next(free)


def _encoded(tokenizer: Tokenizer, layout: _Layout, text: str, names: Mapping[str, str]) -> Iterator[int]:
    for part in layout.special.split(text) if layout.special else [text]:
        if part in tokenizer.special:
            yield tokenizer.special[part]
        elif part:
            yield from tokenizer.encode(part.translate({ord(character): name for character, name in names.items()}))
