"""What a target is asked while it teaches its drafter: questions of many kinds about many things.

Rule: things that held-out prompts speak of appear in no other prompt.
"""

import random

THINGS = (
    "rivers", "the printing press", "bread", "volcanoes", "public libraries", "the violin", "solar panels", "chess",
    "the Roman Empire", "bees", "electric cars", "jazz", "the water cycle", "vaccines", "bicycles", "black holes",
    "coffee", "the stock market", "coral reefs", "a small bookshop", "machine learning", "gardening",
    "the moon landing", "football", "bridges", "dinosaurs", "meditation", "the Silk Road", "antibiotics",
    "lighthouses", "databases", "cooking for children", "the human heart", "earthquakes", "pottery", "wind turbines",
    "dogs", "poetry", "railways", "the French Revolution", "sleep", "cheese", "satellites", "a job interview",
    "mountains", "recycling", "photography", "the alphabet", "winter", "swimming", "museums", "the brain", "tea",
    "maps", "an online shop", "spiders", "theatre", "batteries", "markets", "the ocean",
)
QUESTIONS = (
    "Tell me about {}.", "Explain {} to a child of ten.", "Write a short story about {}.",
    "What are the three most important facts about {}?", "Write a poem of eight lines about {}.",
    "List five advantages and five disadvantages of {}.", "How has {} changed over the last hundred years?",
    "Write an email to a colleague about {}.", "What should a beginner know about {}?",
    "Summarise what is known about {} in one paragraph.", "Write a dialogue between two friends about {}.",
    "Give me step by step advice about {}.", "Why does {} matter?", "Write a JSON object that describes {}.",
    "Make a table in Markdown about {}.", "What questions would an expert ask about {}?",
    "Write a Python function that has to do with {}.", "Compare {} with something similar.",
    "Write the beginning of a novel in which {} plays a part.", "What are common misunderstandings about {}?",
    "Draft a speech of one minute about {}.", "Describe a day that has everything to do with {}.",
    "Write a quiz of four questions, with answers, about {}.", "Suggest names for a company that deals with {}.",
    "Explain the history of {}.", "What will {} be like in fifty years?", "Write a review of a book about {}.",
    "Translate into simple words: what is special about {}?", "Give three examples that show how {} works.",
    "Write instructions for someone who meets {} for the first time.",
)
HELD_OUT_EVERY = 8


def questions(seed: int = 0) -> tuple[list[str], list[str]]:
    """Those to learn from and the held-out ones, each in an order of its own."""
    order = random.Random(seed)
    held_out: list[str] = []
    training: list[str] = []
    for number, thing in enumerate(THINGS):
        those = held_out if number % HELD_OUT_EVERY == 0 else training
        those += [question.format(thing) for question in QUESTIONS]
    order.shuffle(training)
    order.shuffle(held_out)
    return training, held_out


def split(lines: list[str]) -> tuple[list[str], list[str]]:
    """Prompts of one's own: every eighth is held out. Raises ValueError when they are too few."""
    if len(lines) < HELD_OUT_EVERY:
        raise ValueError(f"{len(lines)} prompts are too few: give at least {HELD_OUT_EVERY}, one a line")
    held_out = lines[::HELD_OUT_EVERY]
    return [line for at, line in enumerate(lines) if at % HELD_OUT_EVERY], held_out
