"""`meristem policy`: try a policy before it is used, and see the one that comes along."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from meristem.cli.answer import Json, answer, columns, tell
from meristem.errors import ConflictingKeys, WrongValue

if TYPE_CHECKING:
    from meristem.safety.policy import Policy

app = typer.Typer(help="Try a policy of prompts and outputs, and see the one that comes along.")

File = Annotated[str, typer.Argument(metavar="FILE", help="A policy as YAML, or 'default' for the one in the package.")]
PolicyFile = Annotated[
    str | None,
    typer.Option("--policy", metavar="FILE", help="Policy of prompts and outputs, or 'default'.", show_default=False),
]
BypassPolicy = Annotated[
    str | None,
    typer.Option("--bypass-policy", metavar="REASON", help="Do not apply the policy; the reason is recorded."),
]


def policy_of(path: str | None, bypass: str | None) -> "Policy":
    """The policy of the options ``--policy`` and ``--bypass-policy``."""
    from meristem.safety.policy import NO_POLICY, load_policy

    if path is not None:
        return load_policy(path, bypass, tell)
    if bypass is not None:
        raise ConflictingKeys("--bypass-policy is given and no --policy that it would bypass. Leave it out.")
    return NO_POLICY


@app.command()
def test(
    file: File,
    text: Annotated[
        str | None, typer.Option("--text", help="A text to judge; what would be given on is shown.", show_default=False)
    ] = None,
    place: Annotated[str, typer.Option("--place", metavar="prompt|output", help="What the text is.")] = "prompt",
    as_json: Json = False,
) -> None:
    """Check a policy: every rule does what its examples say, and no text can make one slow.

    With --text the exit code is 1 where the text would be blocked.

    \b
    Examples:
      meristem policy test default
      meristem policy test mine.yaml --text "my ssn is 123-45-6789" --place output
    """
    from dataclasses import asdict

    from meristem.safety.policy import load_policy

    if place not in ("prompt", "output"):
        raise WrongValue(f"--place is {place}; expected prompt or output.", key="place", value=place)
    policy = load_policy(file)
    rules = policy.rules
    assert rules is not None  # noqa: S101 - what was loaded has rules
    shown = [
        {
            "id": rule.id,
            "action": rule.action,
            "severity": rule.severity,
            "places": sorted(rule.places),
            "n_examples": len(config.examples.match) + len(config.examples.no_match),
        }
        for rule, config in zip(rules.rules, rules.config.rules, strict=True)
    ]
    held = policy.stream("output").n_held_back if policy.reads("output") else 0
    result: dict[str, Any] = {"policy": rules.name, "fingerprint": rules.fingerprint, "held_back": held, "rules": shown}
    if text is not None:
        verdict = policy.check(text, "prompt" if place == "prompt" else "output")
        result |= {"text": verdict.text, "is_blocked": verdict.blocked is not None}
        result["hits"] = [asdict(hit) for hit in verdict.hits]
    answer(result, as_json, _words)
    if result.get("is_blocked"):
        raise typer.Exit(1)


def _words(result: Mapping[str, Any]) -> list[str]:
    rows = [
        (*(rule[key] for key in ("id", "action", "severity")), ", ".join(rule["places"]), rule["n_examples"])
        for rule in result["rules"]
    ]
    lines = columns(("rule", "action", "severity", "applies to", "examples"), rows)
    lines += ["", f"All examples are as they say. Streams hold back {result['held_back']} characters at most."]
    if "hits" in result:
        lines += [
            "",
            *(f"{hit['action']}: {hit['rule_id']} at {hit['start']} to {hit['end']}" for hit in result["hits"]),
        ]
        lines += [result["text"] + (" (the rest is blocked)" if result["is_blocked"] else "")]
    return lines


@app.command()
def show(file: File = "default", as_json: Json = False) -> None:
    """Print a policy file; the one that comes along is a beginning for one of your own.

    \b
    Examples:
      meristem policy show > mine.yaml
      meristem policy show mine.yaml --json
    """
    from meristem.safety.rules import policy_text, read_rules

    if as_json:
        answer(read_rules(file).config.model_dump(mode="json"), True, lambda value: ())
    else:
        typer.echo(policy_text(file)[1], nl=False)
