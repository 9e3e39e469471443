"""Prompts for benchmarks: plain English of any length, the same on every machine, alike in nothing but style."""

import random
from collections.abc import Callable

SENTENCES = (
    "The river rises in the hills north of the town and turns three wheels before it reaches the sea.",
    "A compiler reads a program twice: once to learn its names, once to write its instructions.",
    "Nobody in the village remembers who planted the walnut tree beside the old school.",
    "When the price of copper fell, the company closed two mines and opened a repair shop.",
    "Bread needs flour, water, salt and time, and the last of these is the one that people save on.",
    "The committee met on Tuesday, agreed on nothing, and decided to meet again on Thursday.",
    "A good map leaves out almost everything and keeps what a walker needs.",
    "Light from that star left it when our grandparents were children.",
    "The train was late because the signal at the bridge had frozen in the night.",
    "She tuned the violin by ear, then checked it against a fork, and was off by very little.",
    "Every library has one shelf where the books that nobody returns ought to be.",
    "The engine turns heat into motion and loses more than half of it on the way.",
    "He counted the sheep at the gate, as his father had done, in a language nobody else spoke.",
    "A queue that is always full tells you nothing about how fast it moves.",
    "The recipe asks for two eggs, but one large one and a spoon of milk will do.",
    "On the third day the fog lifted and they saw how close to the rocks they had slept.",
    "The law was meant for carriages and has been applied to bicycles ever since.",
    "If the answer is needed by noon, ask in the morning and ask only one question.",
    "The museum keeps its best painting in a room without windows at the end of a corridor.",
    "Ants find the shortest way by walking all the ways and remembering the one that smells most.",
    "A bridge is designed for the worst truck, the worst wind and the worst inspector.",
    "Most of the letters in the box were bills, one was a poem, and none had been opened.",
    "The well is forty metres deep, and the water in it tastes of iron after rain.",
    "Chess players resign early; children play on until the king is taken.",
    "To learn a language, read what you would read anyway, and be patient with the verbs.",
    "The harvest was poor, so the miller took his share in promises and wrote them on the wall.",
)


def words(seed: int, sentences: int) -> str:
    """`sentences` sentences in an order of their own."""
    chooser = random.Random(seed)
    return " ".join(chooser.choice(SENTENCES) for _ in range(sentences))


def tokens(encode: Callable[[str], list[int]], seed: int, length: int) -> list[int]:
    """Exactly `length` token ids of such text."""
    text = words(seed, length // 12 + 2)
    ids = encode(text)
    while len(ids) < length:
        text += " " + words(seed + 1_000_003, 4)
        ids = encode(text)
    return ids[:length]
