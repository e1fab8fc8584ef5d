"""The small world every generated text speaks of: people, places, things and words.

All of it is fixed by `WORLD_SEED`; corpus and instructions only choose what to say about it.
"""

import random
from dataclasses import dataclass
from functools import cache

WORLD_SEED = 7


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_PEOPLE = _names("""
Ada Alma Anton Arlo Bela Boris Bruno Carla Cora Dario Dina Edgar Elsa Emil Enzo Esme Fara Felix
Fiona Gita Greta Gus Hanna Hector Helga Hugo Ida Igor Ines Ivan Jana Jonas Judy Kai Karin Lars
Leo Lena Luca Mara Milo Mira Nadia Nils Nora Olaf Oscar Otto Paula Pedro Petra Quinn Rita Rosa
Ruben Sonja Stefan Tara Theo Tilda Ugo Vera Viktor Wanda
""")

_PLACES = _names("""
Aldur Belmo Brack Calno Corvin Dorn Eskel Fenwick Galt Harrow Ister Jorvik Kelda Lunby Mirth
Norrin Ostry Pelham Quorn Ravel Selby Tarn Ulmer Velmo Wendle Yarrow Zandor Brindle Castor
Dunmore Elgin Farrow Gresham Hollin Imber Keswick
""")

_THINGS = _names("""
anchor barrel basket bell bench blanket bottle bucket candle carpet chest clock compass cradle
drum flute hammer harp kettle ladder lantern map mirror needle paddle pillow plough rope saddle
scarf shovel spoon statue sword table trumpet
""")

_WORDS = _names("""
apple arrow autumn bacon badge beach berry bird blue board bread bridge brush cabin cake chair
cloud coat corn crane crown dance desert dragon dream eagle earth field finger fire flag flame
forest frog fruit garden ghost giant globe goat grape grass green guitar hand honey horse house
iron island jacket jungle king kite knife lake lemon letter light lion magic maple market milk
monkey moon mouse music night north ocean olive onion orange paint pearl pencil piano planet
plum pocket pond queen rabbit ring river robin rocket sail shark shell ship silver sister smoke
snow spider star storm sugar summer tiger tower train tree tulip turtle valley violin wagon
water whale wheat wheel white window winter wolf yellow zebra
""")

_JOBS = _names("""
baker banker barber builder butcher carpenter cook dentist doctor driver farmer fisher gardener
hunter judge miller miner nurse painter pilot poet potter sailor singer smith tailor teacher
weaver
""")

_PETS = _names("""
canary cat crow dog donkey duck falcon ferret goose hamster hen hedgehog lizard mole parrot pony
pug rat snail swan toad
""")

_GOODS = _names("""
amber beer bricks butter cheese cider clocks cloth coal copper dolls figs glue hats ink ivory
jam kilns lace mint nuts oil paper pears plums roses salt silk soap songs spice steel tea tiles
wine wool
""")

_MATERIALS = _names("""
brass bronze clay cotton felt glass gold iron leather marble oak pine silk steel tin wool
""")

_ROOMS = _names("""
attic barn cellar chapel garage garden hall kitchen library loft office porch shed stable
studio tower
""")


@dataclass(frozen=True)
class Person:
    """One inhabitant: where they live, what they do, which animal they keep."""

    name: str
    home: str
    job: str
    pet: str


@dataclass(frozen=True)
class Place:
    """One town and the goods it is known for."""

    name: str
    goods: str


@dataclass(frozen=True)
class Thing:
    """One object, what it is made of and where it is kept."""

    name: str
    material: str
    room: str


@dataclass(frozen=True)
class World:
    """Everything there is to know."""

    people: tuple[Person, ...]
    places: tuple[Place, ...]
    things: tuple[Thing, ...]
    words: tuple[str, ...]


def article(noun: str) -> str:
    """Return the noun with its indefinite article."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


@cache
def build_world() -> World:
    """Build the one world; the same on every call and every machine."""
    rng = random.Random(WORLD_SEED)
    goods = rng.sample(_GOODS, len(_PLACES))
    return World(
        people=tuple(
            Person(name, rng.choice(_PLACES), rng.choice(_JOBS), rng.choice(_PETS))
            for name in _PEOPLE
        ),
        places=tuple(Place(name, good) for name, good in zip(_PLACES, goods, strict=True)),
        things=tuple(Thing(name, rng.choice(_MATERIALS), rng.choice(_ROOMS)) for name in _THINGS),
        words=_WORDS,
    )
