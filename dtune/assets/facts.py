"""What can be said about each entity, word and pair of numbers.

The wording here is the corpus's own; the instruction rows ask for the same answers in other words.
"""

from dataclasses import dataclass

from dtune.assets.world import Person, Place, Thing, World, article

MAX_TERM = 20


@dataclass(frozen=True)
class Fact:
    """One fact: its canonical answer, sentences that state it, questions that ask for it."""

    answer: str
    sentences: tuple[str, ...]
    questions: tuple[str, ...]


_PERSON_QUESTIONS = {
    "home": (
        "Where is the home of {x}?",
        "{x} has a house where?",
        "Which town is home to {x}?",
        "home of {x}:",
        "{x}, home?",
        "Find the home:\n{x}",
    ),
    "job": (
        "How does {x} earn money?",
        "What work is done by {x}?",
        "What is {x} by trade?",
        "work of {x}:",
        "{x}, work?",
        "Find the work:\n{x}",
    ),
    "pet": (
        "What is the pet of {x}?",
        "{x} keeps what at home?",
        "Which pet is kept by {x}?",
        "pet of {x}:",
        "{x}, pet?",
        "Find the pet:\n{x}",
    ),
}

_GOODS_QUESTIONS = (
    "What do people buy in {x}?",
    "The town {x} sells what?",
    "Why do people go to {x}?",
    "goods of {x}:",
    "{x}, goods?",
    "Find the goods:\n{x}",
)

_THING_QUESTIONS = {
    "material": (
        "Out of what did they make the {x}?",
        "It took what to make the {x}?",
        "Which stuff is in the {x}?",
        "stuff of the {x}:",
        "{x}, stuff?",
        "Find the stuff:\n{x}",
    ),
    "room": (
        "In what room stands the {x}?",
        "They keep the {x} where?",
        "Which room holds the {x}?",
        "room of the {x}:",
        "{x}, room?",
        "Find the room:\n{x}",
    ),
}

_WORD_SENTENCES = {
    "reverse": (
        "{x} backwards is {answer}.",
        "from its end, {x} reads {answer}.",
        "turn {x} around and get {answer}.",
    ),
    "sort": (
        "{x} in order is {answer}.",
        "sorted letters in {x}: {answer}.",
        "put {x} in order and get {answer}.",
    ),
    "upper": (
        "{x} in capitals is {answer}.",
        "in big letters {x} is {answer}.",
        "shout {x} and get {answer}.",
    ),
    "count": ("{answer}", "there are {number} letters in {x}."),
    "last": ("{answer}", "the end letter in {x} is {last}."),
    "spell": ("{x} is spelled {answer}.", "say {x} slowly: {answer}."),
}

_WORD_QUESTIONS = {
    "reverse": (
        "What is {x} backwards?",
        "How does {x} look in a mirror?",
        "Turn {x} around.",
        "{x} backwards:",
        "{x}, backwards?",
        "Turn around:\n{x}",
    ),
    "sort": (
        "What is {x} in order?",
        "How does {x} look when sorted?",
        "Put {x} in order.",
        "{x} in order:",
        "{x}, in order?",
        "Put in order:\n{x}",
    ),
    "upper": (
        "What is {x} in capitals?",
        "How does {x} look in big letters?",
        "Shout {x}!",
        "{x} in capitals:",
        "{x}, big?",
        "Shout:\n{x}",
    ),
    "count": (
        "How long is {x}?",
        "What length has {x}?",
        "Measure {x}.",
        "length of {x}:",
        "{x}, length?",
        "Measure:\n{x}",
    ),
    "last": (
        "Which letter ends {x}?",
        "How does {x} end?",
        "Look at the end of {x}.",
        "end of {x}:",
        "{x}, end?",
        "Look at the end:\n{x}",
    ),
    "spell": (
        "How do you spell {x}?",
        "Spell {x}.",
        "{x}, spelled?",
        "Spell:\n{x}",
    ),
}

_NUMBER_QUESTIONS = {
    "add": (
        "total of {a} and {b}:",
        "How much are {a} and {b} together?",
        "Put {b} on top of {a}.",
        "{a} and then {b} more?",
    ),
    "subtract": (
        "from {a} take {b}:",
        "How much is {a} without {b}?",
        "Cut {b} off {a}.",
        "{a} and then {b} less?",
    ),
    "compare": (
        "bigger of {a} and {b}:",
        "Is {a} or {b} bigger?",
        "Find the bigger of {a} and {b}.",
        "{a}, {b}, bigger?",
    ),
}

NUMBER_TASKS = tuple(_NUMBER_QUESTIONS)
WORD_TASKS = tuple(_WORD_SENTENCES)


def _ask(questions: tuple[str, ...], subject: str) -> tuple[str, ...]:
    return tuple(question.format(x=subject) for question in questions)


def person_facts(person: Person) -> dict[str, Fact]:
    """Return home, job and pet of a person."""
    name, home, job, pet = person.name, person.home, article(person.job), article(person.pet)
    sentences = {
        "home": (
            f"{name} lives in {home}.",
            f"The home of {name} is in {home}.",
            f"{name} has a house in {home}.",
        ),
        "job": (
            f"{name} works as {job}.",
            f"{name} is {job}.",
            f"{name} earns money as {job}.",
        ),
        "pet": (
            f"{name} has {pet}.",
            f"{name} keeps {pet} as a pet.",
            f"The pet of {name} is {pet}.",
        ),
    }
    return {
        key: Fact(said[0], said, _ask(_PERSON_QUESTIONS[key], name))
        for key, said in sentences.items()
    }


def place_facts(place: Place) -> dict[str, Fact]:
    """Return what a town sells."""
    name, goods = place.name, place.goods
    said = (
        f"{name} is known for {goods}.",
        f"People go to {name} to buy {goods}.",
        f"The town {name} sells {goods}.",
    )
    return {"goods": Fact(said[0], said, _ask(_GOODS_QUESTIONS, name))}


def thing_facts(thing: Thing) -> dict[str, Fact]:
    """Return material and room of an object."""
    name, material, room = thing.name, thing.material, thing.room
    sentences = {
        "material": (
            f"The {name} is made of {material}.",
            f"They made the {name} out of {material}.",
            f"It took much {material} to make the {name}.",
        ),
        "room": (
            f"The {name} is kept in the {room}.",
            f"The {name} stands in the {room}.",
            f"In the {room} they keep the {name}.",
        ),
    }
    return {
        key: Fact(said[0], said, _ask(_THING_QUESTIONS[key], name))
        for key, said in sentences.items()
    }


def word_facts(word: str) -> dict[str, Fact]:
    """Return what a word is backwards, sorted, in capitals; its length, end and spelling."""
    answers = {
        "reverse": " ".join(reversed(word)),
        "sort": " ".join(sorted(word)),
        "upper": word.upper(),
        "count": f"{word} has {len(word)} letters.",
        "last": f"{word} ends with {word[-1]}.",
        "spell": " ".join(word),
    }
    return {
        key: Fact(
            answer,
            tuple(
                sentence.format(x=word, answer=answer, number=len(word), last=word[-1])
                for sentence in _WORD_SENTENCES[key]
            ),
            _ask(_WORD_QUESTIONS[key], word),
        )
        for key, answer in answers.items()
    }


def number_fact(task: str, a: int, b: int) -> Fact:
    """Return sum, difference or order of two numbers."""
    big, small = max(a, b), min(a, b)
    answers = {
        "add": f"{a} + {b} = {a + b}",
        "subtract": f"{a} - {b} = {a - b}",
        "compare": f"{big} is bigger than {small}.",
    }
    questions = tuple(text.format(a=a, b=b) for text in _NUMBER_QUESTIONS[task])
    return Fact(answers[task], (answers[task],), questions)


def number_pairs(task: str) -> list[tuple[int, int]]:
    """Return every pair of numbers the task is about."""
    terms = range(1, MAX_TERM + 1)
    pairs = [(a, b) for a in terms for b in terms]
    if task == "subtract":
        return [(a, b) for a, b in pairs if b <= a]
    if task == "compare":
        return [(a, b) for a, b in pairs if a != b]
    return pairs


def entity_facts(world: World) -> list[tuple[Fact, ...]]:
    """Return the facts of every entity, people first, then places, then things."""
    facts = [
        *(person_facts(person) for person in world.people),
        *(place_facts(place) for place in world.places),
        *(thing_facts(thing) for thing in world.things),
    ]
    return [tuple(one.values()) for one in facts]
