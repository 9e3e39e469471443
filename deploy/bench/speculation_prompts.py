"""Requests on which speculation is measured: work that repeats what stands before it, and open talk.

    edit    code comes back with one thing changed
    json    facts out of a text, as JSON records of one shape
    quote   a passage of a document in the prompt, word for word
    chat    open questions
"""

from collections.abc import Callable, Mapping

FUNCTIONS = (
    ("load_orders", "path", "orders", "order"),
    ("read_readings", "filename", "readings", "reading"),
    ("parse_routes", "source", "routes", "route"),
    ("import_players", "location", "players", "player"),
)

CODE = '''def {name}({where}):
    """Read {many} from a file, one on each line."""
    {many} = []
    with open({where}) as file:
        for line in file:
            line = line.strip()
            if not line:
                continue
            fields = line.split(",")
            {one} = {{"name": fields[0], "count": int(fields[1]), "price": float(fields[2])}}
            {many}.append({one})
    return {many}


def total_of_{many}({many}):
    """The value of all {many} together."""
    total = 0.0
    for {one} in {many}:
        total += {one}["count"] * {one}["price"]
    return total
'''

PEOPLE = (
    ("Anna Berg", 34, "Oslo"), ("Luca Conti", 41, "Turin"), ("Maria Silva", 28, "Porto"), ("Jan Novak", 52, "Brno"),
    ("Eva Lind", 37, "Malmo"), ("Paul Weber", 45, "Graz"), ("Sara Levi", 31, "Haifa"), ("Omar Aziz", 39, "Fez"),
)

DOCUMENT = (
    "Water enters the mill through a channel of oak, three feet wide. ",
    "The wheel turns a shaft that carries two gears of iron. ",
    "The smaller gear drives the upper stone at ninety turns a minute. ",
    "Grain falls from the hopper into the eye of the upper stone. ",
    "Flour leaves at the rim and runs down a wooden spout into sacks. ",
    "A bell rings when the hopper is nearly empty, so that the stones never run dry. ",
    "Every second month the stones are lifted and their furrows cut anew. ",
    "In winter the channel is closed, and the wheel is tied with a rope. ",
)

QUESTIONS = (
    "What makes bread rise, and why does it need time?",
    "Give me some advice for a first visit to the mountains.",
    "Explain to a child why the sky is blue.",
    "How does a bicycle stay upright?",
    "Write a short story about a lighthouse keeper and a lost whale.",
    "What should I think about before I buy a used car?",
    "Describe how a small town changes when a railway comes.",
    "Why do people like music? Give several reasons.",
    "How would you plan a garden for a shady yard?",
    "Tell me about the history of paper.",
    "What are the benefits of learning a second language?",
    "Write a letter to a friend who is moving abroad.",
)


def edit(number: int) -> str:
    name, where, many, one = FUNCTIONS[number % len(FUNCTIONS)]
    code = CODE.format(name=name, where=where, many=many, one=one)
    return (f"Here is a Python program:\n\n```python\n{code}```\n\nRename the function {name} to read_all and leave "
            "everything else as it is. Answer with the whole program and nothing else.")


def json(number: int) -> str:
    people = [PEOPLE[(number + place) % len(PEOPLE)] for place in range(6)]
    facts = " ".join(f"{name} is {age} years old and lives in {town}." for name, age, town in people)
    name, age, town = people[0]
    return (f"{facts}\n\nWrite every person of this text as JSON, one record a line, in this form:\n"
            f'{{"name": "{name}", "age": {age}, "city": "{town}"}}')


def quote(number: int) -> str:
    document = "".join(DOCUMENT[(number + place) % len(DOCUMENT)] for place in range(len(DOCUMENT)))
    return f"Repeat this text exactly, word for word, and say nothing else:\n\n{document}"


def chat(number: int) -> str:
    return QUESTIONS[number % len(QUESTIONS)]


KINDS: Mapping[str, Callable[[int], str]] = {"edit": edit, "json": json, "quote": quote, "chat": chat}
REPETITIVE = ("edit", "json", "quote")
