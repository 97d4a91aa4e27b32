"""Files of tests/data in the forms of other programs' training data, and the texts that they hold."""

from pathlib import Path
from typing import NamedTuple

DATA = Path(__file__).parent / "data"


class Texts(NamedTuple):
    query: str
    positives: list[str]
    negatives: list[str]


QUERIES = ["How does a heron fish?", "What bends a rainbow?", "Why do cats purr?", "Who wound the tower clock?"]
HERON, RAINBOW, PURR, CLOCK = FIRST = [
    "A heron stands still and stabs at fish.",
    "Drops bend the light of the sun.",
    "Cats purr when they are content.",
    "The sexton wound the clock each Friday.",
]
NESTS, FLAGS, DUSK, BRICK = WRONG = [
    "Herons nest in tall trees.",
    "Rainbows are painted on many flags.",
    "Cats hunt at dusk.",
    "The tower was built of brick.",
]
NAMED = ("--columns", "query,positive,negative")


def texts(positives: list[list[str]], negatives: list[list[str]]) -> list[Texts]:
    return [Texts(*sample) for sample in zip(QUERIES, positives, negatives, strict=True)]


def each(ones: list[str]) -> list[list[str]]:
    return [[one] for one in ones]


FORMATS: dict[str, list[Texts]] = {
    "flag_embedding.jsonl": texts(
        [[HERON], [RAINBOW, "Light is refracted in raindrops."], [PURR], [CLOCK]],
        [
            [NESTS, "Fish swim in schools.", "A kingfisher dives for fish."],
            [FLAGS],
            [DUSK, "Dogs bark at strangers."],
            [BRICK, "Clocks have two hands.", "The sexton rang the bells."],
        ],
    ),
    "tevatron.jsonl": texts(
        [
            ["Heron It stands still and stabs at fish."],
            [RAINBOW, "Light It is refracted in raindrops."],
            ["Cat Cats purr when they are content."],
            [CLOCK],
        ],
        [
            ["Heron It nests in tall trees.", "Fish swim in schools."],
            ["Flags Rainbows are painted on many."],
            ["Cat Cats hunt at dusk.", "Dog Dogs bark at strangers."],
            ["Tower It was built of brick."],
        ],
    ),
    "sentence_transformers.csv": texts(each(["A heron stands still, and stabs at fish.", *FIRST[1:]]), each(WRONG)),
    "sentence_transformers_tuples.csv": texts(
        each(FIRST),
        [
            [NESTS, "A kingfisher dives for fish.", "Fish swim in schools."],
            [FLAGS],
            [DUSK, "Dogs bark at strangers."],
            [BRICK, "Clocks have two hands.", "The sexton rang the bells."],
        ],
    ),
    "simcse.csv": [
        Texts("A heron, by the water, fishes.", ["A bird is fishing."], ["The heron is asleep."]),
        Texts(
            "Drops of rain bend the light.",
            ["Light is bent by raindrops."],
            ["The rain is over, and it is night."],
        ),
        Texts("A cat purrs on a sofa.", ["A content cat lies on a sofa."], ["A cat runs from a dog."]),
        Texts("The sexton winds the clock.", ["A clock is wound by a man."], ["Nobody is in the tower."]),
    ],
    "msmarco.tsv": texts(each(FIRST), each([NESTS, FLAGS, 'Cats "hunt" at dusk.', BRICK])),
    "msmarco_without_header.tsv": texts(each(FIRST), each([NESTS, FLAGS, 'Cats "hunt" at dusk.', BRICK])),
}
"""By file: what it holds."""


def options_of(name: str) -> tuple[str, ...]:
    """What process_data.py has to be told of a file."""
    return NAMED if "without_header" in name else ()
