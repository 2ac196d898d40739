"""Regular expressions that no text can make slow, and whose matches are short enough to wait for.

``re`` tries every way in which the repeats of a pattern can divide a text. Here the ways are counted before a pattern
is used, and too many of them are refused; so is a repeat without an end, unless it is given one.
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from re import _compiler as compiler  # type: ignore[attr-defined]
from re import _constants as codes  # type: ignore[attr-defined]
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any, Final

from meristem.errors import PolicyError

MOST_CHARACTERS: Final = 1000
"""Of a pattern."""
LONGEST: Final = 1024
"""Characters of a match, and of what a pattern reads around it."""
MOST_WAYS: Final = 5000

FLAGS: Final = {"ignorecase": re.IGNORECASE, "multiline": re.MULTILINE, "dotall": re.DOTALL, "ascii": re.ASCII}

_REPEATS: Final = frozenset({codes.MAX_REPEAT, codes.MIN_REPEAT, codes.POSSESSIVE_REPEAT})
_SINGLE: Final = frozenset({codes.LITERAL, codes.NOT_LITERAL, codes.IN, codes.ANY})
_SAMPLE: Final = tuple(map(chr, range(0x300)))
"""Characters on which two classes are compared."""
_TOKEN: Final = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\{(?P<least>\d*),\}|[*+]|.", re.DOTALL)


@dataclass(frozen=True)
class Bounded:
    """A pattern, the characters of its longest match, and how many it may read before and after a match."""

    pattern: "re.Pattern[str]"
    width: int
    context: int


def bounded(text: str, flags: Sequence[str] = (), max_length: int | None = None) -> Bounded:
    """Compile a pattern; PolicyError where it is none, may match nothing, or is not bounded.

    max_length: what the repeats without an end (``*``, ``+``, ``{n,}``) go up to.
    """
    if len(text) > MOST_CHARACTERS:
        raise PolicyError(f"a pattern of {len(text)} characters; at most {MOST_CHARACTERS} are read. Divide it.")
    if max_length is not None:
        text = _with_ends(text, max_length)
    value = re.NOFLAG
    for name in flags:
        value |= FLAGS[name]
    try:
        pattern = re.compile(text, value)
        tree = parser.parse(text, value)
    except (re.error, OverflowError, RecursionError) as cause:
        raise PolicyError(f"the pattern {text!r} is no regular expression: {cause}.") from cause
    if pattern.flags & re.VERBOSE:
        raise PolicyError(f"the pattern {text!r} is verbose, which is not read here. Write it in one line.")
    least, width = tree.getwidth()
    around = max((each.getwidth()[1] for each in _looks(tree)), default=0)
    if least == 0:
        raise PolicyError(f"the pattern {text!r} matches the empty text, and so every text. Make it match something.")
    if max(width, around) > LONGEST:
        raise PolicyError(
            f"the pattern {text!r} may match or read more than {LONGEST} characters, for which a stream would wait. "
            f"Give its repeats an end, as {{1,40}}, or set max_length."
        )
    if _ways(tree, is_whole=True) > MOST_WAYS:
        raise PolicyError(
            f"the pattern {text!r} can divide a text in more than {MOST_WAYS} ways, so that a text could make it slow. "
            f"Bound its repeats more closely, and put none within another."
        )
    return Bounded(pattern, int(width), int(around) + 2)


def _with_ends(text: str, max_length: int) -> str:
    """The pattern with an end for each repeat that has none."""

    def ended(token: "re.Match[str]") -> str:
        if token["least"] is not None:
            return f"{{{token['least'] or 0},{max(max_length, int(token['least'] or 0))}}}"
        return {"*": f"{{0,{max_length}}}", "+": f"{{1,{max_length}}}"}.get(token[0], token[0])

    return _TOKEN.sub(ended, text)


def _within(value: Any) -> Iterator[Any]:
    """The patterns within what the parser says of one item."""
    if isinstance(value, parser.SubPattern):
        yield value
    elif isinstance(value, tuple | list):
        for each in value:
            yield from _within(each)


def _looks(tree: Any) -> Iterator[Any]:
    """The patterns that look ahead or behind, at any depth."""
    for code, value in tree:
        for inner in _within(value):
            if code in (codes.ASSERT, codes.ASSERT_NOT):
                yield inner
            yield from _looks(inner)


def _ways(tree: Any, *, is_whole: bool = False) -> int:
    """In how many ways a pattern can match, at most; a little above ``MOST_WAYS`` for all that are more.

    A repeat counts once where the text decides its length. is_whole: nothing comes after the pattern.
    """
    ways = 1
    for number, (code, value) in enumerate(tree):
        inner = [_ways(each) for each in _within(value)]
        if code in _REPEATS:
            least, most = int(value[0]), min(int(value[1]), LONGEST)
            own = sum(min(inner[0] ** n, MOST_WAYS + 1) for n in range(least, most + 1))
            own = 1 if _is_decided(tree, number, is_whole) else own
        elif code is codes.BRANCH:
            first = [each[0] for each in value[1] if len(each) and each[0][0] is codes.LITERAL]
            own = max(inner) if len({each[1] for each in first}) == len(value[1]) else sum(inner)
        else:
            own = math.prod(inner)
        ways = min(ways * max(own, 1), MOST_WAYS + 1)
    return ways


def _is_decided(tree: Any, number: int, is_whole: bool) -> bool:
    """Whether the repeat at a place of a pattern is of characters with which nothing after it can begin."""
    own = _repeated(tree, number)
    for after in range(number + 1, len(tree)):
        is_repeat = tree[after][0] in _REPEATS
        other = _repeated(tree, after) if is_repeat else _characters(tree, tree[after])
        if not own or not other or own & other:
            return False
        if not is_repeat or tree[after][1][0] > 0:
            return True
    return bool(own) and is_whole


def _repeated(tree: Any, number: int) -> frozenset[str]:
    """What a repeat of single characters takes; nothing for another."""
    inner = tree[number][1][2]
    return _characters(inner, inner[0]) if len(inner) == 1 else frozenset()


def _characters(tree: Any, item: Any) -> frozenset[str]:
    """Which characters of the sample an item takes; none for what is more than one character."""
    if item[0] not in _SINGLE:
        return frozenset()
    pattern = compiler.compile(parser.SubPattern(tree.state, [item]), tree.state.flags)
    return frozenset(filter(pattern.match, _SAMPLE))
