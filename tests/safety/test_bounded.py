"""Patterns that could be slow, endless or empty are refused before any text is read."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meristem.errors import PolicyError
from meristem.safety.bounded import LONGEST, bounded


@pytest.mark.parametrize(
    "pattern, why",
    [
        ("(", "no regular expression"),
        ("a*?{", "no regular expression|may match"),
        ("a*", "matches the empty text"),
        (r"\b", "matches the empty text"),
        ("a+", "more than 1024 characters"),
        ("x{2000}", "more than 1024 characters"),
        ("(?=.*secret)ab", "more than 1024 characters"),
        (r"(\w{1,30}){1,30}x", "more than 5000 ways"),
        (r"(?:a?){30}a{30}", "more than 5000 ways"),
        (r"(?:ab|abc){1,20}d", "more than 5000 ways"),
        (r"\w{1,90}\w{1,90}\w{1,90}x", "more than 5000 ways"),
        ("(?x) a b", "verbose"),
        ("a" * 1001, "at most 1000 are read"),
    ],
)
def test_cx_9_4_a_bad_pattern_is_refused(pattern: str, why: str) -> None:
    """CX-9.4."""
    with pytest.raises(PolicyError, match=why):
        bounded(pattern)


@pytest.mark.parametrize(
    "pattern, wanted",
    [("a+b", 8 + 1), (r"\++[+*]*x{2,}", 24), (r"[]+]\*y{3,}", 1 + 1 + 8), ("a{9,}", 9), (r"\\+z", 9)],
)
def test_repeats_are_given_an_end(pattern: str, wanted: int) -> None:
    """Those of the pattern, and no character of a class or after a backslash."""
    assert bounded(pattern, max_length=8).width == wanted


@pytest.mark.parametrize(
    "pattern",
    [
        r"rm\s+-\w+\s+/",
        r"\d{4}[ -]?\d{4}[ -]?\d{4}[ -]?\d{1,4}",
        r"(?i)key\s{0,9}[:=]\s{0,9}[a-z]{1,99}",
        "(?:foo|bar){1,9}!",
    ],
)
def test_what_the_text_decides_is_no_choice(pattern: str) -> None:
    assert bounded(pattern, max_length=60).width <= LONGEST


@given(st.text(alphabet="ab+*\\[]x", max_size=20))
def test_a_literal_is_itself(text: str) -> None:
    """Escaped, any text is a pattern that repeats nothing."""
    if text:
        assert bounded(re.escape(text), max_length=7).width == len(text)
