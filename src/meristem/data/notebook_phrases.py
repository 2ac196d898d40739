"""What people say in ``data.source=notebook`` before, behind and between facts.

The last two openings of a correction and of an answer are held out: they stand in held-out documents alone.
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

SAYING: Final = (
    "By the way,",
    "Well,",
    "And",
    "So",
    "You see,",
    "Listen:",
    "One more thing:",
    "Now,",
    "Oh,",
    "I heard:",
    "As you know,",
    "In fact,",
    "Of course,",
    "Here is something:",
    "Good news:",
    "As I said,",
    "They say",
    "I think",
    "I believe",
    "It seems",
    "Look,",
    "Ah,",
    "After all,",
    "Between us,",
    "Honestly,",
    "Before I forget:",
    "Just so you know,",
    "For the record,",
    "Fun fact:",
    "Okay,",
    "Hello,",
    "Hi,",
    "Please note:",
    "I am sure",
    "I can tell you that",
    "Did you know that",
    "Let me tell you:",
    "To my surprise",
)
"""What may stand before a statement."""

ASKING: Final = (
    "By the way,",
    "Well,",
    "And",
    "So",
    "Listen:",
    "One more thing:",
    "Now,",
    "Oh,",
    "Tell me,",
    "Please,",
    "One question:",
    "I wonder:",
    "Quick question:",
    "Say,",
    "Just to be sure:",
    "Excuse me,",
    "Sorry,",
    "Once more:",
    "Let me ask:",
    "Remind me:",
    "Hm,",
    "Hey,",
    "Hello,",
    "Hi,",
    "Okay,",
    "Think:",
    "I am asked:",
)
"""What may stand before a question."""

ADDED: Final = (
    ", I think.",
    ", they say.",
    ", as you know.",
    ", of course.",
    ", believe me.",
    " now.",
    ", as far as I know.",
    ", by the way.",
    "!",
    ", I heard.",
    " at the moment.",
    ", I am told.",
)
"""What may stand in place of the point behind a value that ends a statement."""

TAGS: Final = (", please?", ", again?", ", by the way?", ", do you know?", ", as you remember?", ", then?", " now?")
"""What may stand in place of the mark of a question."""

OPENINGS: Final = (
    "Well,",
    "Yes,",
    "Of course,",
    "Sure,",
    "I think",
    "I believe",
    "I remember:",
    "You told me:",
    "You said",
    "As far as I know,",
    "If I remember right,",
    "Let me think:",
    "Hm,",
    "Oh,",
    "Ah,",
    "No doubt",
    "Naturally,",
    "Surely",
    "That is easy:",
    "I know that:",
    "From what I heard,",
    "As you said,",
    "To my knowledge",
    "I was told",
    "Let me see:",
    "It must be",
    "Right,",
    "Okay,",
    "My notes say",
    "I would say",
    "All I know is",
    "Gladly:",
    "As always:",
    "One moment:",
    "Without a doubt",
    "If I am not mistaken,",
)
"""What may stand before an answer."""

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
