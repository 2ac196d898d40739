"""What people say in ``data.source=notebook`` before, behind and between facts.

The last two openings of a correction are held out: they stand in held-out documents alone.
"""

from typing import Final

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

NEWS: Final = ("Actually,", "No,", "Now", "Since today", "From now on", "Wait:", "Correction:", "Things change:")
"""What may stand before a statement of a new value where the old one is not named."""

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
