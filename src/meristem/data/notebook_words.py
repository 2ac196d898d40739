"""The words of ``data.source=notebook``: attributes with their wordings and values, names of people and places.

The last two statements and the last two questions of every attribute, the last two openings of a correction and every
eighth name are held out: they stand in held-out documents alone.
"""

from dataclasses import dataclass
from typing import Final

HELD_OUT: Final = 2
"""How many wordings of each kind are held out: the last ones."""

_STARTS: Final = "Al Be Ca Do El Fa Gi Ha Il Jo Ka Li Mo Ne Or Pa Ri Sa To Ul Va Wi Ya Ze".split()
_ENDS: Final = "da len mir nar rol sel tan via wen lod rist bert mund ska nor dine".split()
_SITES: Final = "Oster Linden Stein Kar Brun Wald Mar Hol Nyr Vester Alten Gran Fal Hamm Kirk Lund Soder Thorn".split()
_SITE_ENDS: Final = "burg ford haven mouth stad wick dale port field ness".split()

_MIDDLES: Final = ("", *"ra li no ve mi to sa lu be ki da re".split())

NAMES: Final = tuple(start + middle + end for start in _STARTS for middle in _MIDDLES for end in _ENDS)
"""So many that a tokenizer does not have most of them as one token: who has learned to recall of names in general can
recall of one that it never met."""
PLACES: Final = ("Oslo", "Lima", "Cairo", "Quito", "Turin", *(site + end for site in _SITES for end in _SITE_ENDS))


@dataclass(frozen=True)
class Attribute:
    """What may be said of a person. ``{s}`` is the person and ``{v}`` the value, which comes after the person.

    name: what a correction calls it. questions: each with its answer behind it, as ``Where does {s} live? In {v}.``
    """

    name: str
    values: tuple[str, ...]
    statements: tuple[str, ...]
    questions: tuple[str, ...]


def _attribute(name: str, values: tuple[str, ...], statements: str, questions: str) -> Attribute:
    return Attribute(name, values, tuple(statements.strip().split("\n")), tuple(questions.strip().split("\n")))


def _property(what: str, values: str) -> Attribute:
    """An attribute that a person has: a colour, a day, a number."""
    return _attribute(
        what,
        tuple(values.split()),
        f"""
The {what} of {{s}} is {{v}}.
{{s}} has a {what}: {{v}}.
As for {{s}}, the {what} is {{v}}.
For {{s}} the {what} is {{v}}.
Note for {{s}}: {what} {{v}}.
About {{s}}: the {what} is {{v}}.
{{s}}, {what}: {{v}}.
It is known that the {what} of {{s}} is {{v}}.
{{s}} told me the {what}: {{v}}.
The {what} that {{s}} gave was {{v}}.
Write down for {{s}} that the {what} is {{v}}.
{{s}} says the {what} is {{v}}.
Whoever knows {{s}} knows the {what}, {{v}}.
Of {{s}} they say that the {what} is {{v}}.""",
        f"""
What is the {what} of {{s}}? It is {{v}}.
Which {what} has {{s}}? The answer is {{v}}.
Do you know the {what} of {{s}}? Yes, {{v}}.
And {{s}}, which {what}? That is {{v}}.
"Tell me the {what} of {{s}}." "It is {{v}}."
The {what} of {{s}}, please? That is {{v}}.
{{s}}, {what}? {{v}}.
Is the {what} of {{s}} known? It is {{v}}.
Say the {what} of {{s}}. It is {{v}}.
What did {{s}} give as the {what}? It was {{v}}.
And if they want the {what} of {{s}}? It is {{v}}.
Who remembers the {what} of {{s}}? I do: {{v}}.
Can you remember the {what} of {{s}}? Certainly: {{v}}.
Should somebody want to know the {what} of {{s}}, what do you say? I say {{v}}.""",
    )


ATTRIBUTES: Final = (
    _attribute(
        "home",
        PLACES,
        """
{s} lives in {v}.
The home of {s} is in {v}.
{s} has a house in {v}.
{s} moved to {v}.
You will find {s} in {v}.
Letters for {s} go to {v}.
{s} is from {v}.
{s} comes from {v}.
The house of {s} stands in {v}.
The town of {s} is {v}.
{s} went to live in {v}.
One meets {s} in {v}.
Home, for {s}, means {v}.
These days {s} resides in {v}.""",
        """
Where does {s} live? In {v}.
In which town is {s} at home? In {v}.
"Where is the house of {s}?" "In {v}."
Do you know where {s} lives? Yes, in {v}.
To which town do letters for {s} go? To {v}.
And {s}, which town? That is {v}.
Where is {s} from? From {v}.
Where does {s} come from? From {v}.
Where is {s} at home? In {v}.
What is the town of {s}? It is {v}.
{s}, which town? {v}.
Who knows where {s} lives? I do: in {v}.
In what place would one visit {s}? In {v}.
Could you say where {s} resides? Certainly: in {v}.""",
    ),
    _attribute(
        "work",
        tuple("baker carpenter doctor farmer judge librarian mason nurse pilot tailor teacher weaver".split()),
        """
{s} works as a {v}.
{s} is a {v}.
By trade {s} is a {v}.
{s} earns a living as a {v}.
The work of {s} is that of a {v}.
{s} was trained as a {v}.
{s} has become a {v}.
{s} has the work of a {v}.
People know {s} as a {v}.
{s}, work: {v}.
The trade of {s} is that of a {v}.
{s} has always been a {v}.
For a living {s} is a {v}.
They hired {s} as a {v}.""",
        """
What does {s} work as? As a {v}.
What is {s} by trade? A {v}.
"What is the work of {s}?" "That of a {v}."
Do you know the trade of {s}? Yes, a {v}.
How does {s} earn a living? As a {v}.
And {s}, which work? That of a {v}.
{s}, which trade? {v}.
What has {s} become? A {v}.
What is {s} known as? As a {v}.
As what was {s} trained? As a {v}.
Is the trade of {s} known? That of a {v}.
Who remembers the work of {s}? I do: a {v}.
What was {s} hired as? As a {v}.
What does {s} do for a living? The work of a {v}.""",
    ),
    _property("favourite colour", "black blue brown green grey orange pink purple red silver white yellow"),
    _property("favourite food", "apples beans bread cheese honey lentils mushrooms noodles plums rice soup tofu"),
    _property("pet", "cat dog donkey duck ferret goat hamster parrot pony rabbit snake tortoise"),
    _property("meeting day", "Monday Tuesday Wednesday Thursday Friday Saturday Sunday"),
    _property("first language", "Basque Czech Danish Finnish Greek Hindi Irish Korean Latin Malay Tamil Welsh"),
    _property("instrument", "banjo cello drum flute guitar harp horn lute oboe organ piano viola"),
    _property("birth month", "January February March April June July August September October November"),
    _property("door code", " ".join(str(1000 + 7919 * number % 9000) for number in range(1, 201))),
)

CORRECTIONS: Final = (
    "no longer {v}:",
    "not {v} any more.",
    "no more {v}.",
    "it was {v} until now.",
    "forget {v}.",
    "so much for {v}.",
    "that is no longer {v}.",
    "cross out {v}.",
)
"""What announces that a value has changed, before a statement of the new one."""

ECHOES: Final = ("Yes, {v}.", "{v}, noted.", "In short, {v}.", "Again: {v}.", "Aha, {v}.", "So, {v}.")
"""What may follow a sentence that ends in a value."""
