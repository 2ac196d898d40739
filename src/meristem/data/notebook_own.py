"""The words of ``data.source=notebook`` for what people say of themselves; the last two of each kind are held out."""

from typing import Final

from meristem.data.notebook_words import ATTRIBUTES, Attribute, attribute


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
    return attribute(what, values, statements, questions)


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
