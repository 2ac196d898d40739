"""The words of ``data.source=notebook``: attributes with their wordings and values.

The last two statements and the last two questions of every attribute are held out: they stand in held-out documents
alone.
"""

from dataclasses import dataclass
from typing import Final

from meristem.data.notebook_names import PLACES

HELD_OUT: Final = 2
"""How many wordings of each kind are held out: the last ones."""


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


def _property(what: str, values: tuple[str, ...], statements: str, questions: str, article: str = "") -> Attribute:
    """An attribute that a person has, as a colour, in words of its own and in words that any may have.

    article: what stands before a value in the latter.
    """
    a, v = "an" if what[0] in "aeiou" else "a", f"{article}{{v}}"
    statements += f"""
The {what} of {{s}} is {v}.
{{s}}'s {what} is {v}.
{{s}}'s {what}: {v}.
Remember that {{s}}'s {what} is {v}.
If somebody asks, {{s}}'s {what} is {v}.
{{s}} chose {a} {what}, and it is {v}.
When it comes to the {what}, {{s}} says {v}.
I asked {{s}} about the {what}, and it is {v}.
There is {{s}}, whose {what} is {v}.
Everybody knows {{s}}'s {what}, {v}.
{{s}} has {a} {what}: {v}.
As for {{s}}, the {what} is {v}.
For {{s}} the {what} is {v}.
Note for {{s}}: {what} {v}.
About {{s}}: the {what} is {v}.
{{s}}, {what}: {v}.
It is known that the {what} of {{s}} is {v}.
{{s}} told me the {what}: {v}.
The {what} that {{s}} gave was {v}.
Write down for {{s}} that the {what} is {v}.
{{s}} says the {what} is {v}.
Whoever knows {{s}} knows the {what}, {v}.
Of {{s}} they say that the {what} is {v}."""
    questions += f"""
What is the {what} of {{s}}? It is {v}.
What is {{s}}'s {what}? It is {v}.
What's {{s}}'s {what}? It is {v}.
{{s}}'s {what}? {v}.
Tell me {{s}}'s {what}. It is {v}.
What {what} does {{s}} have? It is {v}.
Do you still know {{s}}'s {what}? Yes, {v}.
I forgot {{s}}'s {what}. It is {v}.
What was {{s}}'s {what} again? It was {v}.
What {what} did {{s}} choose? That was {v}.
Which is {{s}}'s {what}? That is {v}.
What do you know about {{s}}'s {what}? It is {v}.
Which {what} has {{s}}? The answer is {v}.
Do you know the {what} of {{s}}? Yes, {v}.
And {{s}}, which {what}? That is {v}.
"Tell me the {what} of {{s}}." "It is {v}."
The {what} of {{s}}, please? That is {v}.
{{s}}, {what}? {v}.
Is the {what} of {{s}} known? It is {v}.
Say the {what} of {{s}}. It is {v}.
What did {{s}} give as the {what}? It was {v}.
And if they want the {what} of {{s}}? It is {v}.
Who remembers the {what} of {{s}}? I do: {v}.
Can you remember the {what} of {{s}}? Certainly: {v}.
Should somebody want to know the {what} of {{s}}, what do you say? I say {v}."""
    return _attribute(what, values, statements, questions)


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
        "favourite colour",
        tuple(
            (
                "amber beige black blue brown coral cream crimson gold green grey indigo ivory lilac maroon orange "
                "pink purple red scarlet silver turquoise violet white yellow"
            ).split()
        ),
        """
{s} likes {v} best of all colours.
{s} loves the colour {v}.
{s} always wears {v}.
{s} paints everything {v}.
Of all colours {s} prefers {v}.
If {s} may choose a colour, it is {v}.
{s}'s colour is {v}.""",
        """
Which colour does {s} like best? It is {v}.
What colour does {s} love? It is {v}.
What colour does {s} like? It is {v}.
What does {s} always wear? It is {v}.
Which colour does {s} prefer? It is {v}.
What is {s}'s colour? It is {v}.""",
    ),
    _property(
        "favourite food",
        tuple(
            (
                "apples bananas beans bread cake carrots cheese cherries chocolate curry fish grapes honey lentils "
                "mushrooms noodles olives pancakes pasta pears pizza plums potatoes rice salad soup tofu"
            ).split()
        ),
        """
{s} likes {v}.
{s} loves {v}.
{s} eats {v} every day.
{s} likes to eat {v}.
{s} could live on {v}.
For dinner {s} wants {v}.
{s} always orders {v}.""",
        """
What does {s} like to eat? That would be {v}.
What does {s} eat? That would be {v}.
What food does {s} love? That would be {v}.
What does {s} love to eat? That would be {v}.
What does {s} want for dinner? That would be {v}.
What should we cook for {s}? That would be {v}.
What does {s} always order? That would be {v}.""",
    ),
    _property(
        "pet",
        tuple(
            (
                "cat dog donkey duck ferret fox frog goat goose hamster hen horse lizard mouse parrot pig pony rabbit "
                "rat sheep snake spider tortoise turtle"
            ).split()
        ),
        """
{s} has a {v}.
{s} keeps a {v}.
{s} has got a {v}.
{s} owns a {v}.
{s} bought a {v}.
{s} lives with a {v}.
{s} has a pet {v}.
{s} takes care of a {v}.""",
        """
What pet does {s} keep? A {v}.
What animal does {s} have? A {v}.
What kind of pet does {s} have? A {v}.
Which animal does {s} keep? A {v}.
What animal does {s} own? A {v}.
Which animal lives with {s}? A {v}.
Does {s} have a pet? Yes, a {v}.""",
        article="a ",
    ),
    _property(
        "meeting day",
        tuple("Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()),
        """
{s} comes on {v}.
We meet {s} on {v}.
The meeting with {s} is on {v}.
I see {s} on {v}.
{s} is coming on {v}.
{s} will be here on {v}.""",
        """
When do we meet {s}? On {v}.
When does {s} come? On {v}.
On which day do we meet {s}? On {v}.
When is the meeting with {s}? On {v}.
When will {s} be here? On {v}.
When do I see {s}? On {v}.""",
    ),
    _property(
        "first language",
        tuple(
            (
                "Arabic Basque Bengali Catalan Chinese Czech Danish Dutch English Finnish French German Greek Hebrew "
                "Hindi Irish Italian Japanese Korean Latin Malay Persian Polish Russian Spanish Swahili Swedish Tamil "
                "Turkish Welsh"
            ).split()
        ),
        """
{s} speaks {v}.
{s} grew up with {v}.
At home {s} speaks {v}.
{s} talks to us in {v}.
{s} writes in {v}.
{s} learned {v} first.""",
        """
Which language does {s} speak? {v}.
What does {s} speak? {v}.
What language does {s} speak at home? {v}.
In what language does {s} write? In {v}.
Which language did {s} grow up with? {v}.
Which language did {s} learn first? {v}.""",
    ),
    _property(
        "instrument",
        tuple(
            (
                "banjo bassoon cello clarinet drum fiddle flute guitar harp horn lute oboe organ piano trumpet "
                "tuba viola violin"
            ).split()
        ),
        """
{s} plays the {v}.
{s} can play the {v}.
{s} is learning the {v}.
{s} practises the {v}.
{s} is good at the {v}.
In the band {s} plays the {v}.""",
        """
What does {s} play? The {v}.
Which instrument does {s} play? The {v}.
What instrument can {s} play? The {v}.
What is {s} learning to play? The {v}.
What does {s} play in the band? The {v}.
What does {s} practise? The {v}.""",
        article="the ",
    ),
    _property(
        "birth month",
        tuple("January February March April May June July August September October November December".split()),
        """
{s} was born in {v}.
{s}'s birthday is in {v}.
The birthday of {s} is in {v}.
{s} has a birthday in {v}.
{s} turns a year older in {v}.
{s} came into the world in {v}.""",
        """
When was {s} born? In {v}.
In which month was {s} born? In {v}.
When is {s}'s birthday? In {v}.
When is the birthday of {s}? In {v}.
When does {s} have a birthday? In {v}.
When does {s} turn a year older? In {v}.""",
    ),
    _property(
        "door code",
        tuple(str(1000 + 7919 * number % 9000) for number in range(1, 201)),
        """
{s} opens the door with {v}.
{s} types {v} at the door.
At the door of {s} one types {v}.
The code for {s}'s door is {v}.
{s}'s code is {v}.
To visit {s}, enter {v}.""",
        """
What is {s}'s code? It is {v}.
What does {s} type at the door? {v}.
Which code opens the door of {s}? It is {v}.
How do I open {s}'s door? With {v}.
What should I enter to visit {s}? {v}.
What is the code for {s}'s door? It is {v}.""",
    ),
    _property(
        "age",
        tuple(str(age) for age in range(5, 100)),
        """
{s} is {v} years old.
{s} is {v}.
{s} has turned {v}.
{s} is about {v}.
{s} is now {v} years of age.
Since last year {s} is {v}.""",
        """
How old is {s}? {v}.
How old is {s} now? {v} years old.
How many years old is {s}? {v}.
What age is {s}? {v}.
How old has {s} turned? {v}.
Do you know how old {s} is? Yes, {v}.""",
    ),
    _property(
        "partner",
        (),
        """
{s} is married to {v}.
{s} married {v}.
{s} lives with {v}.
{s} is the partner of {v}.
{s} loves {v}.
{s} is together with {v}.""",
        """
Who is {s} married to? To {v}.
Who did {s} marry? {v}.
Who lives with {s}? {v}.
Who is {s}'s partner? It is {v}.
Who does {s} love? {v}.
Who is {s} together with? With {v}.""",
    ),
)


def _own(what: str, statements: str, questions: str, article: str = "") -> Attribute:
    """An attribute of whoever speaks, in words of its own, and in words that any may have behind them."""
    values, v = next((each.values for each in ATTRIBUTES if each.name == what), ()), f"{article}{{v}}"
    statements += f"""
My {what} is {v}.
As for me, my {what} is {v}.
About me: my {what} is {v}.
Remember my {what}: {v}.
My {what}: {v}.
Note that my {what} is {v}.
I told you my {what}: {v}.
You should know that my {what} is {v}.
Write down that my {what} is {v}."""
    questions += f"""
What is my {what}? It is {v}.
Do you know my {what}? Yes, {v}.
And my {what}? That is {v}.
My {what}, please? That is {v}.
My {what}? {v}.
Can you tell me my {what}? It is {v}.
Say my {what}. It is {v}.
Who remembers my {what}? I do: {v}.
Do you remember my {what}? Certainly: {v}."""
    return _attribute(what, values, statements, questions)


OWN: Final = (
    _own(
        "name",
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
        """
I live in {v}.
I come from {v}.
I am from {v}.
I have a house in {v}.
I moved to {v}.""",
        """
Where do I live? In {v}.
Where am I from? From {v}.
Where do I come from? From {v}.
Where is my house? In {v}.""",
    ),
    _own(
        "work",
        """
I work as a {v}.
I am a {v}.
By trade I am a {v}.
I earn a living as a {v}.""",
        """
What do I work as? As a {v}.
What am I by trade? A {v}.
What is my job? That of a {v}.""",
        article="that of a ",
    ),
    _own(
        "favourite colour",
        """
I like {v} best of all colours.
I love the colour {v}.""",
        """
Which colour do I like best? It is {v}.
What colour do I love? It is {v}.""",
    ),
    _own(
        "favourite food",
        """
I like {v}.
I love {v}.
I like to eat {v}.
I eat {v} every day.""",
        """
What do I like to eat? That would be {v}.
What do I eat? That would be {v}.
What food do I love? That would be {v}.""",
    ),
    _own(
        "pet",
        """
I have a {v}.
I keep a {v}.
I have got a {v}.
I have a pet {v}.""",
        """
What pet do I keep? A {v}.
What animal do I have? A {v}.
Do I have a pet? Yes, a {v}.""",
        article="a ",
    ),
    _own(
        "meeting day",
        """
I come on {v}.
I will be here on {v}.""",
        """
When do I come? On {v}.
When will I be here? On {v}.""",
    ),
    _own(
        "first language",
        """
I speak {v}.
At home I speak {v}.
I grew up with {v}.""",
        """
What language do I speak? {v}.
Which language did I grow up with? {v}.""",
    ),
    _own(
        "instrument",
        """
I play the {v}.
I am learning the {v}.""",
        """
What do I play? The {v}.
Which instrument do I play? The {v}.""",
        article="the ",
    ),
    _own(
        "birth month",
        """
I was born in {v}.
My birthday is in {v}.""",
        """
When was I born? In {v}.
When is my birthday? In {v}.""",
    ),
    _own(
        "door code",
        """
I open the door with {v}.
My code is {v}.""",
        """
What is my code? It is {v}.
How do I open the door? With {v}.""",
    ),
    _own(
        "age",
        """
I am {v} years old.
I have turned {v}.""",
        """
How old am I? {v}.
How old am I now? {v} years old.""",
    ),
    _own(
        "partner",
        """
I am married to {v}.
I live with {v}.""",
        """
Who am I married to? To {v}.
Who do I live with? With {v}.""",
    ),
)
"""What somebody may say of themselves, in a conversation. A ``name`` has the names of persons as its values."""
