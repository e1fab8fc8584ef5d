"""Short stories from a grammar; what they say of the world is true."""

import random

from dtune.assets.world import World, article

_OPENINGS = (
    "One morning {a} the {a_job} left {a_home} with a small bag.",
    "It was a cold day in {a_home}, and {a} the {a_job} was tired.",
    "{a} the {a_job} woke up early in {a_home}.",
)
_MEETINGS = (
    "On the road {a} met {b}, {b_job} from {b_home}.",
    "Soon {b}, {b_job} from {b_home}, came along with {b_pet}.",
    "At the bridge stood {b}, who keeps {b_pet} as a pet.",
)
_ERRANDS = (
    "They went to {place} to buy {goods}.",
    "They needed {goods}, so they walked to {place}.",
    "In the {room} they found the {thing} and took it home.",
    "They sat down in the {room} beside the {thing} made of {material}.",
)
_TURNS = (
    "Then it began to rain.",
    "Then {a_pet} ran away, and {a} ran after it.",
    "Then {b} told a long story about {place}.",
    "Then they were hungry and ate some bread.",
)
_ENDINGS = (
    "At night {a} was back in {a_home} and slept well.",
    "In the end {b} went home to {b_home}, and both were happy.",
    "{a} and {b} stayed friends ever after.",
)


def write_story(world: World, rng: random.Random) -> str:
    """Write five to seven sentences about two people, a town and an object."""
    a, b = rng.sample(world.people, 2)
    place, thing = rng.choice(world.places), rng.choice(world.things)
    parts = [_OPENINGS, _MEETINGS, _ERRANDS, _TURNS, _ENDINGS]
    if rng.random() < 0.5:
        parts.insert(3, _ERRANDS)
    sentences: list[str] = []
    for part in parts:
        sentence = rng.choice(part)
        if sentence not in sentences:
            sentences.append(sentence)
    return " ".join(sentences).format(
        a=a.name,
        a_job=a.job,
        a_home=a.home,
        a_pet=f"the {a.pet}",
        b=b.name,
        b_job=article(b.job),
        b_home=b.home,
        b_pet=article(b.pet),
        place=place.name,
        goods=place.goods,
        thing=thing.name,
        material=thing.material,
        room=thing.room,
    )
