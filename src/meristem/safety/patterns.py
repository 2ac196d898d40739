"""What secrets look like: tokens of known services, private keys, passwords in addresses and assignments.

A pattern is tried only where one of its keywords stands, so that a text without them costs one search for each keyword
and no regular expression at all. Every pattern is bounded: no match is longer than ``LONGEST_BYTES``.
"""

import base64
import binascii
import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

LONGEST_BYTES: Final = 8192
"""Of a match, with what may stand before its value."""

_LEAST_BITS: Final = 3.5
_LEAST_TOKEN_BITS: Final = 3.0
_PLACEHOLDERS: Final = re.compile(
    rb"example|placeholder|your[_-]?|change[_-]?me|dummy|redacted|replace|insert[_-]?|xxxx|\*\*\*|\.\.\.|(.)\1{7}",
    re.IGNORECASE | re.DOTALL,
)


@dataclass(frozen=True)
class SecretPattern:
    """One kind of secret.

    keywords: the texts with which a match begins, of lower case where ``is_folded``.
    pattern: matched where a keyword stands; its group ``value`` is the secret.
    is_secret: of what the pattern takes for a value, whether it is one and no placeholder.
    """

    id: str
    description: str
    keywords: tuple[bytes, ...]
    pattern: "re.Pattern[bytes]"
    is_secret: Callable[[bytes], bool]
    is_folded: bool = False


def entropy_bits(value: bytes) -> float:
    """Bits for each byte, of bytes drawn as often as they stand in ``value``."""
    counts, n_bytes = Counter(value).values(), len(value)
    return -sum(n / n_bytes * math.log2(n / n_bytes) for n in counts)


def _is_token(value: bytes) -> bool:
    return entropy_bits(value) > _LEAST_TOKEN_BITS and not _PLACEHOLDERS.search(value)


def _is_mixed(value: bytes) -> bool:
    """Small and large letters and digits, as drawn at random: a name of a class or a file has not all of them."""
    return _is_token(value) and all(re.search(part, value) for part in (rb"[a-z]", rb"[A-Z]", rb"[0-9]"))


def _is_random(value: bytes) -> bool:
    """A value of an assignment: letters and digits of more than ``_LEAST_BITS``, and no name of something else.

    Words and numbers with ``_``, ``-`` or ``.`` between them are names, as in ``password = settings.db_password_2``.
    """
    if entropy_bits(value) <= _LEAST_BITS or _PLACEHOLDERS.search(value):
        return False
    if not (re.search(rb"[A-Za-z]", value) and re.search(rb"[0-9]", value)):
        return False
    return not re.fullmatch(rb"[A-Za-z]*[0-9]{0,4}(?:[_.:/\-][A-Za-z]*[0-9]{0,4})*", value)


def _is_password(value: bytes) -> bool:
    """A password of an address: anything but a placeholder."""
    if re.fullmatch(rb"(?i)[\[<{$%].*|pass(?:word|wd)?|pwd|secret|token|key|test|x+|user\w*|admin|root", value):
        return False
    return not _PLACEHOLDERS.search(value)


def _is_web_token(value: bytes) -> bool:
    """The head of a JSON Web Token is JSON that names its algorithm."""
    head = value.partition(b".")[0]
    try:
        return b'"alg"' in base64.urlsafe_b64decode(head + b"=" * (-len(head) % 4))
    except (binascii.Error, ValueError):
        return False


def _is_key_body(value: bytes) -> bool:
    body = re.sub(rb"\\[nr]|\s", b"", value)
    return len(body) >= 60 and entropy_bits(body) > _LEAST_BITS


def _token(
    id: str,
    description: str,
    keywords: str,
    body: str,
    is_secret: Callable[[bytes], bool] = _is_token,
) -> SecretPattern:
    """A token that stands alone and begins with one of the ``keywords``. body: the regular expression of the whole."""
    pattern = re.compile(rf"(?<![A-Za-z0-9])(?P<value>{body})(?![A-Za-z0-9])".encode())
    return SecretPattern(id, description, tuple(keywords.encode().split()), pattern, is_secret)


def _assigned(
    id: str,
    description: str,
    keywords: str,
    value: str,
    is_secret: Callable[[bytes], bool],
) -> SecretPattern:
    """A value that is assigned to a name which holds one of the ``keywords``, in any spelling of either."""
    words = tuple(keywords.encode().split())
    names = "|".join(re.escape(word.decode()) for word in words)
    pattern = rf"(?i:{names})[\w.\- ]{{0,24}}[\"']?\s{{0,3}}(?:=>|:=|[:=])\s{{0,3}}[\"']?(?P<value>{value})"
    return SecretPattern(id, description, words, re.compile(pattern.encode()), is_secret, is_folded=True)


PATTERNS: Final = (
    SecretPattern(
        "private-key",
        "a private key as text (RSA, EC, DSA, PKCS#8, encrypted, OpenSSH, PGP)",
        (b"-----BEGIN ",),
        re.compile(
            rb"-----BEGIN (?:[A-Z0-9]{2,12} ){0,2}PRIVATE KEY(?: BLOCK)?-----"
            rb"(?:(?:\s|\\[nr]){1,4}[A-Z][A-Za-z\-]{2,20}: [^\n\\]{1,100}){0,4}"
            rb"(?P<value>[A-Za-z0-9+/=\s\\]{60,7000})"
        ),
        _is_key_body,
    ),
    _token("aws-access-key", "an access key of AWS", "AKIA ASIA", "(?:AKIA|ASIA)[A-Z0-9]{16}"),
    _token("google-api-key", "an API key of Google", "AIza", r"AIza[\w\-]{35}"),
    _token("slack-token", "a token of Slack", "xoxa- xoxb- xoxp- xoxr- xoxs-", r"xox[abprs]-[\w\-]{10,250}"),
    _token(
        "github-token",
        "a token of GitHub",
        "ghp_ gho_ ghu_ ghs_ ghr_ github_pat_",
        r"gh[pousr]_[A-Za-z0-9]{36,251}|github_pat_\w{22,251}",
    ),
    _token("gitlab-token", "a token of GitLab", "glpat-", r"glpat-[\w\-]{20,64}"),
    _token("npm-token", "a token of npm", "npm_", "npm_[A-Za-z0-9]{36}"),
    _token("hugging-face-token", "a token of Hugging Face", "hf_", "hf_[A-Za-z0-9]{34}"),
    _token("stripe-key", "a live key of Stripe", "sk_live_ rk_live_", "[sr]k_live_[A-Za-z0-9]{16,247}"),
    _token("sendgrid-key", "an API key of SendGrid", "SG.", r"SG\.[\w\-]{22}\.[\w\-]{43}"),
    _token("model-api-key", "an API key that begins with sk-", "sk-", r"sk-[\w\-]{20,250}", _is_mixed),
    _token(
        "json-web-token",
        "a signed JSON Web Token",
        "eyJ",
        r"(?<![_\-])eyJ[\w\-]{8,1000}\.eyJ[\w\-]{8,4000}\.[\w\-]{16,1500}",
        _is_web_token,
    ),
    SecretPattern(
        "url-password",
        "a password in an address",
        (b"://",),
        re.compile(rb"://[^\s:/@\"'<>]{0,64}:(?P<value>[^\s:/@\"'<>]{3,128})@[A-Za-z0-9\[]"),
        _is_password,
    ),
    SecretPattern(
        "azure-storage-key",
        "the key of a storage account of Azure",
        (b"AccountKey=",),
        re.compile(rb"AccountKey=(?P<value>[A-Za-z0-9+/]{86}==)"),
        _is_token,
    ),
    SecretPattern(
        "gcp-service-account",
        "the key of a service account of Google Cloud",
        (b'"private_key_id"',),
        re.compile(rb'"private_key_id"\s{0,4}:\s{0,4}"(?P<value>[0-9a-f]{40})"'),
        _is_token,
    ),
    _assigned(
        "aws-secret-key",
        "a secret key of AWS in an assignment",
        "aws_secret aws-secret awssecret secretaccesskey secret_access_key",
        r"[A-Za-z0-9/+]{40}(?![A-Za-z0-9/+=])",
        _is_mixed,
    ),
    _assigned("wandb-key", "an API key of Weights & Biases", "wandb", r"[0-9a-f]{40}(?![0-9a-f])", _is_token),
    _assigned(
        "assigned-secret",
        "a password or key in an assignment",
        "password passwd api_key api-key apikey secret access_token auth_token access-token auth-token private_token",
        r"[^\s\"'`,;&<>(){}\[\]\\]{12,128}",
        _is_random,
    ),
)
"""Of two that match the same bytes, the first is named."""
