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

IN_USE: Final = (
    "Ada Agnes Aisha Alan Alice Amir Anna Anton Ayla Ben Bob Boris Bruno Carla Carlos Chloe Clara Dana David Diego "
    "Dora Edith Elena Eli Emil Emma Erik Eva Felix Fiona Finn Frank Freya George Grace Greta Hana Hanna Hassan Helen "
    "Henry Hugo Ida Igor Ines Ingrid Iris Isaac Ivan Jack Jakob James Jane Jin John Jonas Jorge Judith Julia Karin "
    "Karl Kate Kenji Klara Lars Laura Lena Leo Lily Lina Linus Lisa Luca Lucy Luis Maja Maria Martha Martin Mary Mei "
    "Mia Mila Mona Nadia Nina Noah Nora Olga Oliver Omar Oscar Otto Paula Paul Peter Petra Priya Ravi Rita Robert "
    "Rosa Ruth Sam Sara Simon Sofia Sonja Stefan Susan Tara Tariq Theo Thomas Tom Tove Vera Viktor Walter Yara Yusuf "
    "Zoe"
).split()
"""Names that people have; every eighth of them is held out, as of all names."""
NAMES: Final = (*(start + middle + end for start in _STARTS for middle in _MIDDLES for end in _ENDS), *IN_USE)
"""So many that a tokenizer does not have most of them as one token: who has learned to recall of names in general can
recall of one that it never met."""
_CITIES: Final = (
    "Oslo Lima Cairo Quito Turin Paris London Berlin Rome Madrid Lisbon Vienna Prague Warsaw Dublin Athens Bergen "
    "Boston Chicago Dallas Delhi Dakar Geneva Havana Helsinki Istanbul Jakarta Kyoto Lagos Leeds Lyon Milan Moscow "
    "Mumbai Munich Nairobi Naples Osaka Porto Riga Seattle Seoul Sofia Stockholm Sydney Tokyo Toronto Tunis Utrecht "
    "Valencia Venice York Zagreb Zurich"
).split()
PLACES: Final = (*_CITIES, *(site + end for site in _SITES for end in _SITE_ENDS))


@dataclass(frozen=True)
class Attribute:
    """What may be said of a person. ``{s}`` is the person, where one is named, and ``{v}`` the value, behind it.

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
    a = "an" if what[0] in "aeiou" else "a"
    return _attribute(
        what,
        tuple(values.split()),
        f"""
The {what} of {{s}} is {{v}}.
{{s}}'s {what} is {{v}}.
{{s}}'s {what}: {{v}}.
Remember that {{s}}'s {what} is {{v}}.
If somebody asks, {{s}}'s {what} is {{v}}.
{{s}} chose {a} {what}, and it is {{v}}.
When it comes to the {what}, {{s}} says {{v}}.
I asked {{s}} about the {what}, and it is {{v}}.
There is {{s}}, whose {what} is {{v}}.
Everybody knows {{s}}'s {what}, {{v}}.
{{s}} has {a} {what}: {{v}}.
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
What is {{s}}'s {what}? It is {{v}}.
What's {{s}}'s {what}? It is {{v}}.
{{s}}'s {what}? {{v}}.
Tell me {{s}}'s {what}. It is {{v}}.
What {what} does {{s}} have? It is {{v}}.
Do you still know {{s}}'s {what}? Yes, {{v}}.
I forgot {{s}}'s {what}. It is {{v}}.
What was {{s}}'s {what} again? It was {{v}}.
What {what} did {{s}} choose? That was {{v}}.
Which is {{s}}'s {what}? That is {{v}}.
What do you know about {{s}}'s {what}? It is {{v}}.
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
{s} is living in {v}.
{s} lives in the town of {v}.
{s}'s home is in {v}.
{s}'s home is {v}.
{s} has moved to {v}.
{s} is at home in {v}.
{s} has settled in {v}.
{s} stays in {v}.
{s} has a flat in {v}.
The place where {s} lives is {v}.
I visited {s} in {v}.
{s}'s house is in {v}.
{s} wrote to me from {v}.
If you look for {s}, go to {v}.
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
Where is {s} living? In {v}.
Where is {s}'s home? In {v}.
What is {s}'s home? It is {v}.
Where is {s}? In {v}.
Where has {s} settled? In {v}.
Where did {s} move to? To {v}.
What town does {s} live in? In {v}.
Which town is {s}'s home? It is {v}.
Where can I find {s}? In {v}.
Where would I look for {s}? In {v}.
I forgot where {s} lives. In {v}.
Tell me where {s} lives. In {v}.
Where is {s}'s house? In {v}.
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
        tuple(
            (
                "baker barber butcher carpenter chemist clerk cook dentist doctor driver farmer fisher gardener guard "
                "hunter judge lawyer librarian mason miller miner nurse painter pilot plumber poet porter potter "
                "printer sailor singer smith surgeon tailor teacher waiter weaver writer"
            ).split()
        ),
        """
{s} works as a {v}.
{s} is working as a {v}.
{s} is a {v}.
{s}'s work is that of a {v}.
{s}'s trade is that of a {v}.
{s} has a job as a {v}.
{s} found work as a {v}.
{s} became a {v}.
{s} is employed as a {v}.
You can ask {s}, who is a {v}.
They know {s} as the {v}.
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
What is {s}'s work? That of a {v}.
What is {s}'s trade? That of a {v}.
What is {s}'s job? That of a {v}.
What is {s} working as? As a {v}.
What did {s} become? A {v}.
What job does {s} have? That of a {v}.
What kind of work does {s} do? That of a {v}.
Tell me what {s} works as. As a {v}.
I forgot what {s} does. The work of a {v}.
What is {s}? A {v}.
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
    _property(
        "favourite colour", "black blue brown crimson gold green grey indigo orange pink purple red silver white yellow"
    ),
    _property("favourite food", "apples beans bread cheese honey lentils mushrooms noodles plums rice soup tofu"),
    _property("pet", "cat dog donkey duck ferret goat hamster parrot pony rabbit snake tortoise"),
    _property("meeting day", "Monday Tuesday Wednesday Thursday Friday Saturday Sunday"),
    _property("first language", "Basque Czech Danish Finnish Greek Hindi Irish Korean Latin Malay Tamil Welsh"),
    _property("instrument", "banjo cello drum flute guitar harp horn lute oboe organ piano viola"),
    _property("birth month", "January February March April June July August September October November"),
    _property("door code", " ".join(str(1000 + 7919 * number % 9000) for number in range(1, 201))),
)


def _own(what: str, values: tuple[str, ...], statements: str = "", questions: str = "") -> Attribute:
    """An attribute of whoever speaks, in words that any may have, and in words of its own before them."""
    statements += f"""
My {what} is {{v}}.
As for me, my {what} is {{v}}.
About me: my {what} is {{v}}.
Remember my {what}: {{v}}.
My {what}: {{v}}.
Note that my {what} is {{v}}.
I told you my {what}: {{v}}.
You should know that my {what} is {{v}}.
Write down that my {what} is {{v}}."""
    questions += f"""
What is my {what}? It is {{v}}.
Do you know my {what}? Yes, {{v}}.
And my {what}? That is {{v}}.
My {what}, please? That is {{v}}.
My {what}? {{v}}.
Can you tell me my {what}? It is {{v}}.
Say my {what}. It is {{v}}.
Who remembers my {what}? I do: {{v}}.
Do you remember my {what}? Certainly: {{v}}."""
    return _attribute(what, values, statements, questions)


OWN: Final = (
    _own(
        "name",
        (),
        """
I am {v}.
Call me {v}.
People call me {v}.
I am called {v}.""",
        """
Who am I? You are {v}.
How am I called? You are {v}.
What do people call me? They call you {v}.""",
    ),
    _own(
        "home",
        PLACES,
        """
I live in {v}.
I come from {v}.
I have a house in {v}.
I moved to {v}.""",
        """
Where do I live? In {v}.
Where am I from? From {v}.
Where is my house? In {v}.""",
    ),
    _own(
        "work",
        ATTRIBUTES[1].values,
        """
I work as a {v}.
By trade I am a {v}.
I earn a living as a {v}.""",
        """
What do I work as? As a {v}.
What am I by trade? A {v}.""",
    ),
    *(_own(attribute.name, attribute.values) for attribute in ATTRIBUTES[2:]),
)
"""What somebody may say of themselves, in a conversation. A ``name`` has the names of persons as its values."""

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

ECHOES: Final = ("Yes, {v}.", "Noted: {v}.", "In short, {v}.", "Again: {v}.", "Aha, {v}.", "So, {v}.")
"""What may follow a sentence that ends in a value."""

LEADS: Final = ("By the way,", "Well,", "And", "So", "You see,", "Listen:", "One more thing:", "Now,", "Oh,")
"""What may stand before a statement or a question."""

TITLES: Final = (
    "my friend",
    "our neighbour",
    "old",
    "young",
    "my sister",
    "my brother",
    "your friend",
    "our dear",
    "that",
)
"""What may stand before the name of a person."""

REPLIES: Final = ("I see.", "Noted.", "Good to know.", "All right.", "I shall remember.", "Thank you.", "Go on.")
"""Answers, in a conversation, to what is no question."""

UNTOLD: Final = ("I do not know.", "Nobody told me.", "That I was not told.", "I have not heard.")
"""Answers to a question about what was not said before."""
