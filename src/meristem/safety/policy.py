"""What a policy makes of prompts and outputs, whole or as they come.

A text is judged the same however it was cut into pieces. A stream gives a character once no rule can be about it any
more: it holds back as much as the longest match can be, twice that where the policy allows texts, and no more.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final

from meristem.errors import Blocked, PolicyError
from meristem.events import Emit, Event, silent
from meristem.safety.bounded import Bounded
from meristem.safety.rules import Action, Place, Rule, RuleSet, Severity, read_rules

_STRIDE: Final = 8
"""Characters that are waited for before the rules are tried again, so that short tokens do not each cost a search."""
_PIECE: Final = 1 << 15
"""Characters of a whole text that are judged at once: a search can be interrupted by no other thread."""
_MOST_SPANS: Final = 10
_RANKS: Final[dict[Action, int]] = {"block": 0, "redact": 1, "flag": 2}
_CLASSIFIER: Final = "classifier"
BYPASSED: Final = "safety.bypassed"
"""The event that says what was not applied, and the reason."""


@dataclass(frozen=True)
class Hit:
    """What a rule found, in characters of the whole text; never the text."""

    rule_id: str
    action: Action
    severity: Severity
    start: int
    end: int


@dataclass(frozen=True)
class Verdict:
    """What became of a text. text: as it may be given on, up to where it is blocked. blocked: what forbids the rest."""

    text: str
    hits: tuple[Hit, ...]
    blocked: Hit | None


@dataclass(frozen=True)
class Policy:
    """Rules to be applied. bypass: the reason why they are not, with which every text passes."""

    rules: RuleSet | None = None
    bypass: str | None = None

    @property
    def name(self) -> str:
        """Of the policy."""
        return self.rules.name if self.rules else "none"

    @property
    def fingerprint(self) -> str | None:
        """Of its rules; None without any."""
        return self.rules.fingerprint if self.rules else None

    def reads(self, place: Place) -> bool:
        """Whether any rule is about texts of a place."""
        if self.rules is None or self.bypass is not None:
            return False
        return self.rules.classifier is not None or any(place in rule.places for rule in self.rules.rules)

    def stream(self, place: Place, emit: Emit = silent) -> "PolicyStream":
        """One text that comes in pieces."""
        rules = self.rules if self.reads(place) else None
        return PolicyStream(rules, place, emit)

    def check(self, text: str, place: Place, emit: Emit = silent) -> Verdict:
        """What becomes of a whole text."""
        stream = self.stream(place, emit)
        parts = [stream.feed(text[at : at + _PIECE]) for at in range(0, len(text), _PIECE)]
        return Verdict("".join([*parts, stream.finish()]), tuple(stream.hits), stream.blocked)

    def require(self, text: str, place: Place, emit: Emit = silent) -> str:
        """The text as it may be given on; Blocked where it may not."""
        verdict = self.check(text, place, emit)
        if verdict.blocked is None:
            return verdict.text
        raise self.refusal(verdict.blocked, place)

    def refusal(self, hit: Hit, place: Place) -> Blocked:
        """What is said of a text that a rule forbids."""
        reasons = {rule.id: rule.reason for rule in (self.rules.rules if self.rules else ())}
        why = reasons.get(hit.rule_id, "").rstrip(".")
        advice = "Leave them out" if place == "prompt" else "Ask for something else"
        return Blocked(
            f"the {place} is not allowed: rule '{hit.rule_id}' of policy {self.name}{f' ({why})' if why else ''} "
            f"forbids its characters {hit.start} to {hit.end}. {advice}.",
            rule_id=hit.rule_id,
            place=place,
            start=hit.start,
            end=hit.end,
        )


NO_POLICY: Final = Policy()
"""Every text passes."""


def load_policy(path: str, bypass: str | None = None, emit: Emit = silent) -> Policy:
    """The policy of a file, or ``default``; PolicyError where a rule does not do what its examples say.

    bypass: the reason why it is not applied. It is recorded as an event, as is one that the file gives.
    """
    rules = read_rules(path)
    _try_examples(rules)
    bypass = rules.config.bypass if bypass is None else bypass
    policy = Policy(rules, bypass)
    said = {"policy": rules.name, "fingerprint": rules.fingerprint, "n_rules": len(rules.rules)}
    if bypass is not None:
        if not bypass.strip():
            raise PolicyError("a policy is bypassed for a reason. Say which.", policy=rules.name)
        emit(Event(BYPASSED, said | {"reason": bypass}, "warning"))
    else:
        emit(Event("safety.applied", said))
    return policy


def _try_examples(rules: RuleSet) -> None:
    for rule, config in zip(rules.rules, rules.config.rules, strict=True):
        place: Place = "output" if "output" in rule.places else "prompt"
        for kind, texts, wanted in (
            ("match", config.examples.match, True),
            ("no_match", config.examples.no_match, False),
        ):
            for number, text in enumerate(texts, 1):
                alone = RuleSet(rules.name, rules.config, (rule,), rules.allowed, None)
                if bool(Policy(alone).check(text, place).hits) is not wanted:
                    raise PolicyError(
                        f"rule '{rule.id}' of policy {rules.name}: its example {number} of {kind} is "
                        f"{'passed' if wanted else 'hit'}. Change the pattern or the example.",
                        rule_id=rule.id,
                    )


@dataclass
class _Search:
    """Where one pattern stands. resume: the first character at which no match has been looked for."""

    pattern: Bounded
    rule: Rule | None
    resume: int = 0


@dataclass
class _Span:
    """A part of a match that no allowed text covers."""

    start: int
    end: int
    rule: Rule


@dataclass
class PolicyStream:
    """One text as it comes. hits: what was found so far. blocked: what forbids the rest, of which nothing is given."""

    rules: RuleSet | None
    place: Place
    emit: Emit = silent
    hits: list[Hit] = field(default_factory=list)
    blocked: Hit | None = None

    def __post_init__(self) -> None:
        rules = [rule for rule in (self.rules.rules if self.rules else ()) if self.place in rule.places]
        self._searches = [_Search(pattern, rule) for rule in rules for pattern in rule.patterns]
        self._allowing = [_Search(pattern, None) for pattern in (self.rules.allowed if self.rules else ())]
        every = [search.pattern for search in (*self._searches, *self._allowing)]
        self._width = max((pattern.width for pattern in every), default=0)
        self._context = max((pattern.context for pattern in every), default=0)
        self._text, self._offset, self._sent, self._seen = "", 0, 0, 0
        self._matches: list[_Span] = []
        self._spans: list[_Span] = []
        self._allowed: list[tuple[int, int]] = []

    @property
    def n_held_back(self) -> int:
        """The most characters that wait for what comes after them."""
        return self._width * (2 if self._allowing else 1) + self._context + _STRIDE

    def feed(self, text: str) -> str:
        """What may be given on once this has come; often nothing."""
        if self.rules is None or self.blocked is not None:
            return text if self.rules is None else ""
        self._text += text
        if self.rules.classifier is not None or self._offset + len(self._text) < self._seen + _STRIDE:
            return ""
        return self._given(is_last=False)

    def over(self, pieces: Iterable[str]) -> Iterator[str]:
        """What may be given on of a text in pieces, up to its end or to where it is blocked."""
        for piece in pieces:
            if given := self.feed(piece):
                yield given
            if self.blocked is not None:
                break
        if rest := self.finish():
            yield rest

    def finish(self) -> str:
        """What was held back, when no more text comes; the hits are recorded now."""
        if self.rules is None:
            return ""
        if self.blocked is None and self._text:
            self._classify()
        given = "" if self.blocked is not None else self._given(is_last=True)
        self._record()
        return given

    def _given(self, *, is_last: bool) -> str:
        length = self._seen = self._offset + len(self._text)
        decided = length if is_last else max(length - self._width - self._context, 0)
        for search in (*self._searches, *self._allowing):
            # One whose matches are short knows more of them, and reads less again.
            own = length - search.pattern.width - search.pattern.context
            self._look(search, length if is_last else max(own, 0))
        # What allows the end of a match may begin as late as that.
        limit = decided if is_last or not self._allowing else max(decided - self._width, 0)
        ready = [match for match in self._matches if match.start < limit]
        self._matches = [match for match in self._matches if match.start >= limit]
        self._spans += [span for match in ready for span in self._remains(match)]
        self._spans.sort(key=lambda span: (span.start, _RANKS[span.rule.action], span.rule.number, span.end))
        given = self._emitted(limit)
        self._drop(min(limit, decided))
        return given

    def _look(self, search: _Search, decided: int) -> None:
        """Find the matches that begin before ``decided``; the text after it is enough to know them."""
        find, at = search.pattern.pattern.search, search.resume
        while at < decided and (match := find(self._text, at - self._offset)):
            start, end = match.start() + self._offset, match.end() + self._offset
            if start >= decided:
                break
            if search.rule is None:
                self._allowed.append((start, end))
            else:
                self._matches.append(_Span(start, end, search.rule))
            at = end
        search.resume = max(at, decided)

    def _remains(self, match: _Span) -> list[_Span]:
        """The parts of a match that no allowed text covers."""
        found, at = [], match.start
        for start, end in sorted(self._allowed):
            if start >= match.end or end <= at:
                continue
            if start > at:
                found.append(_Span(at, start, match.rule))
            at = max(at, end)
        return [*found, *([_Span(at, match.end, match.rule)] if at < match.end else [])]

    def _emitted(self, limit: int) -> str:
        """The text up to ``limit`` with what the rules do to it."""
        parts: list[str] = []
        while self._spans and self._spans[0].start < limit:
            span = self._spans.pop(0)
            hit = Hit(span.rule.id, span.rule.action, span.rule.severity, span.start, span.end)
            self.hits.append(hit)
            if span.rule.action == "flag":
                continue
            if span.start >= self._sent:
                parts.append(self._between(self._sent, span.start))
                parts.append("" if span.rule.action == "block" else span.rule.replacement)
            self._sent = max(self._sent, span.end)
            if span.rule.action == "block":
                self.blocked = hit
                return "".join(parts)
        if self._sent < limit:
            parts.append(self._between(self._sent, limit))
            self._sent = limit
        return "".join(parts)

    def _between(self, start: int, end: int) -> str:
        return self._text[start - self._offset : end - self._offset]

    def _drop(self, before: int) -> None:
        """Forget what no pattern reads any more."""
        n_dropped = max(min(before, self._sent) - self._context - self._offset, 0)
        self._text, self._offset = self._text[n_dropped:], self._offset + n_dropped
        self._allowed = [each for each in self._allowed if each[1] > before]

    def _classify(self) -> None:
        """Let the operator's own function judge the whole text; one that fails blocks it, unless it is to fail open."""
        if self.rules is None or self.rules.classifier is None or self.rules.config.classifier is None:
            return
        try:
            why = self.rules.classifier(self._text, self.place)
        except Exception as cause:  # noqa: BLE001 - somebody else's code
            is_open = self.rules.config.classifier.fail_open
            failed = {"error": type(cause).__name__, "place": self.place, "fail_open": is_open}
            self.emit(Event("safety.classifier_failed", failed, "error"))
            why = None if is_open else "it failed"
        if why is not None:
            self.blocked = Hit(_CLASSIFIER, "block", "error", 0, len(self._text))
            self.hits.append(self.blocked)

    def _record(self) -> None:
        """One event for each rule that was hit, without the text."""
        for (rule_id, action, severity), n_hits in Counter(
            (hit.rule_id, hit.action, hit.severity) for hit in self.hits
        ).items():
            spans = [[hit.start, hit.end] for hit in self.hits if hit.rule_id == rule_id][:_MOST_SPANS]
            payload = {"rule_id": rule_id, "action": action, "severity": severity, "place": self.place}
            self.emit(Event("safety.hit", payload | {"n_hits": n_hits, "spans": spans}, severity))
