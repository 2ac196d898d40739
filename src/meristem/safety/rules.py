"""Policies as data: a YAML file of rules, each with examples that are tried before the policy is used."""

import importlib
import importlib.resources
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, Self, TypeAlias, TypeVar

from pydantic import Field, ValidationError, model_validator

from meristem.config import ConfigSection, fingerprint, read_yaml
from meristem.config.mistakes import explain
from meristem.errors import PolicyError
from meristem.safety.bounded import Bounded, bounded

SHIPPED: Final = "default"
"""The name of the policy that comes along."""

Place = Literal["prompt", "output"]
Action = Literal["block", "redact", "flag"]
Severity = Literal["info", "warning", "error", "critical"]
Flag = Literal["ignorecase", "multiline", "dotall", "ascii"]
Classifier: TypeAlias = Callable[[str, str], str | None]
"""Given a text and its place, gives the reason to block it, or None."""

S = TypeVar("S", bound=ConfigSection)


class PatternConfig(ConfigSection):
    """A regular expression and how it is read."""

    pattern: str = Field(min_length=1)
    flags: tuple[Flag, ...] = ()


class MatchConfig(ConfigSection):
    """What a rule is about.

    literals: texts in letters of either case, whose white space stands for any; words are whole unless ``substring``.
    max_length: what repeats without an end go up to.
    """

    literals: tuple[str, ...] = ()
    patterns: tuple[str | PatternConfig, ...] = ()
    substring: bool = False
    max_length: int | None = Field(default=None, ge=1, le=1000)

    @model_validator(mode="after")
    def _is_something(self) -> Self:
        if not self.literals and not self.patterns:
            raise ValueError("at least one of literals and patterns")
        if any(not literal.strip() for literal in self.literals):
            raise ValueError("literals that are not blank")
        return self


class ExamplesConfig(ConfigSection):
    """match: texts that the rule hits. no_match: texts that it passes."""

    match: tuple[str, ...] = Field(min_length=1)
    no_match: tuple[str, ...] = ()


class RuleConfig(ConfigSection):
    """One rule. replacement: what stands for a redacted text; the token of the policy by default."""

    id: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$")
    description: str = ""
    reason: str = ""
    severity: Severity = "warning"
    action: Action
    replacement: str | None = None
    applies_to: Literal["prompt", "output", "all"] = "all"
    match: MatchConfig
    examples: ExamplesConfig


class AllowConfig(ConfigSection):
    """Texts that no rule is about. One frees the text that it covers and no more."""

    literals: tuple[str, ...] = ()
    patterns: tuple[str | PatternConfig, ...] = ()


class ClassifierConfig(ConfigSection):
    """A function of the operator's own that judges whole texts. entry: module:function.

    fail_open: whether a text passes where the function fails; otherwise it is blocked.
    """

    entry: str = Field(pattern=r"^[\w.]+:\w+$")
    fail_open: bool = False


class PolicyConfig(ConfigSection):
    """A policy file. bypass: the reason why it is not applied, which is recorded; null applies it."""

    version: Literal[1]
    enabled: bool = True
    bypass: str | None = Field(default=None, min_length=3)
    redaction_token: str = "[redacted]"
    allow: AllowConfig = AllowConfig()
    rules: tuple[RuleConfig, ...] = Field(min_length=1)
    classifier: ClassifierConfig | None = None


@dataclass(frozen=True)
class Rule:
    """A rule that is ready. number: its place in the file."""

    number: int
    id: str
    action: Action
    severity: Severity
    reason: str
    replacement: str
    places: frozenset[Place]
    patterns: tuple[Bounded, ...]


@dataclass(frozen=True)
class RuleSet:
    """What a file says, ready to be applied. allowed: the patterns of what no rule is about."""

    name: str
    config: PolicyConfig
    rules: tuple[Rule, ...]
    allowed: tuple[Bounded, ...]
    classifier: Classifier | None

    @property
    def fingerprint(self) -> str:
        """Of all that the file says."""
        return fingerprint(self.config)


def policy_text(path: str) -> tuple[str, str]:
    """The name and the text of a policy: of a file, or of the one that comes along."""
    if path == SHIPPED:
        return SHIPPED, (importlib.resources.files("meristem.safety") / "default.yaml").read_text(encoding="utf-8")
    try:
        return path, Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as cause:
        why = cause.strerror if isinstance(cause, OSError) else "it is no UTF-8 text"
        raise PolicyError(
            f"the policy {path} cannot be read: {why}. Give a YAML file, or '{SHIPPED}'.", path=path
        ) from cause


def read_rules(path: str) -> RuleSet:
    """The rules of a policy file, compiled; the examples are not tried yet.

    Raises PolicyError, or the ConfigError of a key or value that is wrong, which names the rule.
    """
    name, text = policy_text(path)
    said = read_yaml(text, f"policy {name}")
    entries = said.pop("rules", None)
    if not isinstance(entries, list) or not entries:
        raise PolicyError(f"policy {name} has no rules, and would pass every text. Give it at least one.", path=path)
    rules = [_read(RuleConfig, entry, f"rule {number} of policy {name}") for number, entry in enumerate(entries, 1)]
    # The rest is checked with one rule in the place of all, so that an error of it is about itself.
    rest = _read(PolicyConfig, {**said, "rules": rules[:1]}, f"policy {name}")
    config = rest.model_copy(update={"rules": tuple(rules)})
    ids = [rule.id for rule in rules]
    if twice := sorted({each for each in ids if ids.count(each) > 1}):
        raise PolicyError(f"policy {name} has the rule '{twice[0]}' twice. Give one another id.", rule_id=twice[0])
    if not config.enabled and config.bypass is None:
        raise PolicyError(f"policy {name} is not enabled and says not why. Set bypass to the reason.", path=path)
    compiled = tuple(_compiled(rule, number, config, name) for number, rule in enumerate(rules, 1))
    allow = config.allow
    allowed = tuple(_patterns(allow.literals, allow.patterns, f"allow of policy {name}"))
    return RuleSet(name, config, compiled, allowed, _classifier(config.classifier, name))


def _read(section: type[S], entry: object, place: str) -> S:
    """One section, with errors that name its place."""
    if not isinstance(entry, Mapping):
        raise PolicyError(f"{place} is {entry!r:.60}; expected a mapping of keys.")
    try:
        return section.model_validate(dict(entry))
    except ValidationError as cause:
        named = entry.get("id")
        raise explain(cause, section, lambda path: f"{place} '{named}'" if named else place) from None


def _compiled(rule: RuleConfig, number: int, config: PolicyConfig, name: str) -> Rule:
    match, place = rule.match, f"rule '{rule.id}' of policy {name}"
    patterns = _patterns(
        match.literals, match.patterns, place, is_part=match.substring, max_length=match.max_length, rule_id=rule.id
    )
    places = frozenset[Place](("prompt", "output") if rule.applies_to == "all" else (rule.applies_to,))
    replacement = config.redaction_token if rule.replacement is None else rule.replacement
    reason = rule.reason or rule.description
    return Rule(number, rule.id, rule.action, rule.severity, reason, replacement, places, tuple(patterns))


def _patterns(
    literals: tuple[str, ...],
    patterns: tuple[str | PatternConfig, ...],
    place: str,
    *,
    is_part: bool = False,
    max_length: int | None = None,
    rule_id: str | None = None,
) -> Iterator[Bounded]:
    given = [PatternConfig(pattern=each) if isinstance(each, str) else each for each in patterns]
    wanted = [(each.pattern, each.flags, max_length) for each in given]
    wanted += [(_of_literal(each, is_part), ("ignorecase",), None) for each in literals]
    for text, flags, longest in wanted:
        try:
            yield bounded(text, flags, longest)
        except PolicyError as cause:
            raise PolicyError(f"{place}: {cause}", rule_id=rule_id) from cause


def _of_literal(literal: str, is_part: bool) -> str:
    """The pattern of a text: whole words, and any white space for white space."""
    text = r"\s{1,4}".join(map(re.escape, literal.split()))
    if is_part:
        return text
    before = r"(?<!\w)" if re.match(r"\w", literal.lstrip()) else ""
    after = r"(?!\w)" if re.search(r"\w$", literal.rstrip()) else ""
    return before + text + after


def _classifier(config: ClassifierConfig | None, name: str) -> Classifier | None:
    if config is None:
        return None
    module, _, function = config.entry.partition(":")
    try:
        found: Classifier = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as cause:
        raise PolicyError(
            f"policy {name}: the classifier {config.entry} is not there: {cause}. Give module:function of what is."
        ) from cause
    return found
