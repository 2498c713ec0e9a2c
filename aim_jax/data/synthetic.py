"""The embedded tasks: English text generated from a seed, with nothing to download.

Their prompts follow those of the real benchmarks, and so do their quarrels: the same words
ask for other labels in another task, and one label means different things. Only
`Random.random` is called, which gives the same numbers in every version of Python.
"""

import random
from collections.abc import Callable, Sequence
from typing import TypeVar

import aim_jax

T = TypeVar("T")
Row = dict[str, str]
# (random numbers, label asked for) -> input and output
Writer = Callable[[random.Random, str], tuple[str, str]]

TRAIN, DEV, TEST = 400, 50, 100

PEOPLE = (
    "Anna Ben Carla David Emma Felix Grace Henry Iris Jack Kate Leo Maria Nina Oscar Paul"
    " Rosa Sam Tina Victor"
).split()
CITIES = "Paris London Rome Berlin Madrid Vienna Oslo Lisbon Cairo Tokyo".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
PLACES = "garden kitchen park school station market forest office hotel library".split()
THINGS = "cup ball book key lamp hat box coat map bag clock knife".split()
ANIMALS = "dog cat horse cow bird fish rabbit lion sheep duck goat fox".split()
COLOURS = "red blue green black white brown yellow grey".split()
STATES = "hungry tired old small sick sleepy young thirsty".split()

TOPICS = {
    "World": "president minister parliament army treaty border embassy refugees ambassador"
    " rebels election voters troops diplomats government senate",
    "Sports": "coach striker league tournament stadium champion referee goalkeeper team"
    " medal athletes playoffs season match sprinter captain",
    "Business": "market shares investors profits merger bank prices stocks revenue bonds"
    " retailer economy loans factory exports brokers",
    "Science": "telescope planet researchers cells laboratory gene atoms software satellite"
    " experiment physicists microscope galaxy protein robot virus",
}
REPORTS = (
    "surprised followed changed joined helped watched shaped left met reached passed stopped"
).split()

ENTITIES = {
    "Company": "firm maker supplier brand engines clothes customers employees products"
    " invoices",
    "Artist": "singer painter guitarist poet songs portraits concerts albums verses melodies",
    "Building": "church tower castle palace windows walls roof stairs arches doors",
    "Village": "settlement hamlet town parish farms inhabitants fields lanes wells cottages",
    "Plant": "shrub tree herb flower leaves roots petals seeds stems berries",
    "Film": "comedy drama thriller western scenes actors director cast dialogue ending",
}
TITLES = (
    "Varden Norvik Talmar Belisa Corvo Delmont Estrid Farrow Galway Hollin Jorvan Kestrel"
    " Lorne Mirade Ostara Penrose Quill Rosden Selby Tarquin"
).split()

OPINIONS = {
    "positive": "great lovely excellent wonderful delicious friendly brilliant charming"
    " superb perfect pleasant amazing",
    "negative": "awful terrible horrible rude dirty boring ugly nasty dreadful broken"
    " disgusting annoying",
    "neutral": "large wooden round new long square plain usual local narrow daily short",
}
ASPECTS = (
    "food room service staff phone story music hotel coat film garden lamp".split()
)

# Words of two senses, and what is done with each.
SENSES = {
    "bank": (
        ("opened an account at the bank", "borrowed money from the bank"),
        ("sat on the bank of the river", "fished from the muddy bank"),
    ),
    "bat": (
        ("swung the bat at the ball", "hit the ball with a bat"),
        ("saw a bat in the cave", "heard a bat fly at night"),
    ),
    "light": (
        ("turned on the light", "read by the light of a lamp"),
        ("carried a light bag", "wore a light coat"),
    ),
    "match": (
        ("won the match on Sunday", "watched the match on television"),
        ("struck a match in the dark", "lit the fire with a match"),
    ),
    "spring": (
        ("planted flowers in spring", "waited for spring after winter"),
        ("fixed the spring of the bed", "pressed the metal spring"),
    ),
    "ring": (
        ("wore a gold ring", "lost the ring from a finger"),
        ("heard the phone ring", "let the bell ring"),
    ),
    "letter": (
        ("posted the letter to a friend", "wrote a long letter home"),
        ("spelled the last letter of the word", "learned a letter of the alphabet"),
    ),
    "bark": (
        ("heard the dog bark", "made the puppy bark"),
        ("peeled bark from the tree", "cut a name in the bark"),
    ),
    "star": (
        ("looked at a star in the sky", "saw a bright star at night"),
        ("met the star of the film", "became a star of music"),
    ),
    "note": (
        ("played a high note", "sang a wrong note"),
        ("left a note on the table", "read the note from school"),
    ),
}

INTENTS = {
    ("buy", "purchase"): "a bike, a phone, a sofa, a car",
    ("fix", "repair"): "a bike, a phone, a clock, a car",
    ("learn", "study"): "Spanish, music, chess, history",
    ("cook", "prepare"): "rice, soup, bread, fish",
    ("clean", "wash"): "a shirt, a coat, a car, a window",
    ("find", "locate"): "a hotel, a market, a station, a library",
}
QUESTIONS = (
    "how can I {}?",
    "how do you {}?",
    "what is the best way to {}?",
    "is there a way to {}?",
    "what do I need to {}?",
)


def task(name: str, seed: int, train: int, dev: int, test: int) -> dict[str, list[Row]]:
    """Rows of each split of a task, `{"id", "input", "output"}`.

    No input occurs twice, and every run of as many rows as there are labels holds each
    label once. Raises InputError for more rows than the task has.
    """
    labels, write = WRITERS[name]
    # A string seeds by its SHA-512, alike in every process.
    rng = random.Random(f"{name} {seed}")
    rows: list[Row] = []
    seen: set[str] = set()
    wanted: list[str] = []
    sizes = {"train": train, "dev": dev, "test": test}
    for split, size in sizes.items():
        for number in range(size):
            wanted = wanted or shuffled(rng, labels)
            label = wanted.pop()
            for _ in range(1000):
                text, output = write(rng, label)
                if text not in seen:
                    break
            else:
                raise aim_jax.InputError(
                    f"task {name}: no more than {len(rows)} distinct inputs, fewer than"
                    f" the {sum(sizes.values())} asked for"
                )
            seen.add(text)
            rows.append(
                {"id": f"{name}-{split}-{number}", "input": text, "output": output}
            )
    return {
        "train": rows[:train],
        "dev": rows[train : train + dev],
        "test": rows[train + dev :],
    }


def pick(rng: random.Random, items: Sequence[T]) -> T:
    """One of `items`."""
    return items[int(rng.random() * len(items))]


def shuffled(rng: random.Random, items: Sequence[T]) -> list[T]:
    """`items` in random order."""
    return sorted(items, key=lambda _: rng.random())


def choose(instruction: str, options: Sequence[str], body: str) -> str:
    """A prompt that asks for one of `options`."""
    return (
        f"{instruction} Choose one from the option. Option: {', '.join(options)}.\n"
        f"{body}\nAnswer:"
    )


def other(rng: random.Random, items: Sequence[T], *taken: T) -> T:
    """One of `items` that is none of `taken`."""
    return pick(rng, [item for item in items if item not in taken])


def report(rng: random.Random, nouns: Sequence[str]) -> str:
    """Sentences about nouns, two in each; their verbs tell nothing."""
    pairs = zip(nouns[::2], nouns[1::2], strict=True)
    return " ".join(f"The {a} {pick(rng, REPORTS)} the {b}." for a, b in pairs)


def description(rng: random.Random, kind: str, traits: Sequence[str]) -> str:
    """A sentence about a thing with a made-up name."""
    name, city = pick(rng, TITLES), pick(rng, CITIES)
    return f"{name} is a {kind} near {city}, known for its {traits[0]} and {traits[1]}."


def review(rng: random.Random, opinions: Sequence[str]) -> str:
    """A sentence with two opinions on two things."""
    a, b = shuffled(rng, ASPECTS)[:2]
    return f"The {a} was {opinions[0]} and the {b} was {opinions[1]}."


def _topic(rng: random.Random, label: str) -> tuple[str, str]:
    nouns = shuffled(rng, TOPICS[label].split())[:4]
    if rng.random() < 0.5:
        nouns[int(rng.random() * 4)] = pick(rng, _foreign(rng, TOPICS, label))
    return choose(
        "What is the topic of the following paragraph?",
        list(TOPICS),
        f"Text: {report(rng, nouns)}",
    ), label


def _entity(rng: random.Random, label: str) -> tuple[str, str]:
    words = ENTITIES[label].split()
    kind, traits = pick(rng, words[:4]), shuffled(rng, words[4:])[:2]
    if rng.random() < 0.5:
        traits[int(rng.random() * 2)] = pick(rng, _foreign(rng, ENTITIES, label)[4:])
    return choose(
        "What is the topic of the following paragraph?",
        list(ENTITIES),
        f"Text: {description(rng, kind, traits)}",
    ), label


def _foreign(rng: random.Random, groups: dict[str, str], label: str) -> list[str]:
    """The words of another group than that of `label`."""
    return groups[other(rng, list(groups), label)].split()


def _sentiment(rng: random.Random, label: str) -> tuple[str, str]:
    """Two opinions; `neutral` is neither, or one of each."""
    signs = [label, pick(rng, (label, "neutral"))]
    if label == "neutral" and rng.random() < 0.5:
        signs = ["positive", "negative"]
    opinions = [pick(rng, OPINIONS[sign].split()) for sign in shuffled(rng, signs)]
    return choose(
        "What is the sentiment of the following paragraph?",
        ("negative", "neutral", "positive"),
        f"Text: {review(rng, opinions)}",
    ), label


def _inference(rng: random.Random, label: str) -> tuple[str, str]:
    name, animal = pick(rng, PEOPLE), pick(rng, ANIMALS)
    colour, place = pick(rng, COLOURS), pick(rng, PLACES)
    about_animal = rng.random() < 0.5
    if label == "entailment":
        says = colour if about_animal else f"in the {place}"
    elif label == "contradiction":
        elsewhere = other(rng, PLACES, place)
        says = other(rng, COLOURS, colour) if about_animal else f"in the {elsewhere}"
    else:
        says = pick(rng, STATES)
    return choose(
        'What is the logical relationship between the "sentence 1" and the'
        ' "sentence 2"?',
        ("neutral", "entailment", "contradiction"),
        f"sentence 1: {name} saw a {colour} {animal} in the {place}.\n"
        f"sentence 2: The {animal} was {says}.",
    ), label


def _question(rng: random.Random, label: str) -> tuple[str, str]:
    things = shuffled(rng, THINGS)[:2]
    places = shuffled(rng, PLACES)[:2]
    asked = int(rng.random() * 2)
    place = places[asked]
    if label == "False":
        # Half of the time a place of the passage, so that its presence says little.
        absent = other(rng, PLACES, *places)
        place = places[1 - asked] if rng.random() < 0.5 else absent
    facts = " ".join(
        f"The {thing} is in the {where}."
        for thing, where in zip(things, places, strict=True)
    )
    return choose(
        "According to the following passage, is the question true or false?",
        ("True", "False"),
        f"question: is the {things[asked]} in the {place}\npassage: {facts}",
    ), label


def _sense(rng: random.Random, label: str) -> tuple[str, str]:
    word = pick(rng, list(SENSES))
    first, second = shuffled(rng, SENSES[word])
    if label == "True":
        uses = shuffled(rng, first)
    else:
        uses = [pick(rng, first), pick(rng, second)]
    sentences = [f"{pick(rng, PEOPLE)} {use}." for use in uses]
    return choose(
        "Given a word and two sentences, whether the word is used with the same sense in"
        " both sentence?",
        ("True", "False"),
        f"word: {word}\n{sentences[0]}\n{sentences[1]}",
    ), label


def _extraction(rng: random.Random, label: str) -> tuple[str, str]:
    names, things = (shuffled(rng, items)[:2] for items in (PEOPLE, THINGS))
    cities, days = (shuffled(rng, items)[:2] for items in (CITIES, DAYS))
    asked = int(rng.random() * 2)
    passage = " ".join(
        f"{names[i]} bought a {things[i]} in {cities[i]} on {days[i]}." for i in (0, 1)
    )
    return (
        "Answer the question with a word of the passage.\n"
        f"question: {label} did {names[asked]} buy the {things[asked]}\n"
        f"passage: {passage}\nAnswer:",
        (cities if label == "where" else days)[asked],
    )


def _paraphrase(rng: random.Random, label: str) -> tuple[str, str]:
    verbs = pick(rng, list(INTENTS))
    things = INTENTS[verbs].split(", ")
    thing = pick(rng, things)
    first = pick(rng, verbs), thing
    second = pick(rng, verbs), thing
    if label == "False":
        if rng.random() < 0.5:
            verbs = other(rng, list(INTENTS), verbs)
            things = INTENTS[verbs].split(", ")
        second = pick(rng, verbs), other(rng, things, thing)
    frames = shuffled(rng, QUESTIONS)
    return choose(
        'Whether the "first sentence" and the "second sentence" have the same meaning?',
        ("False", "True"),
        f"first sentence: {frames[0].format(' '.join(first))}\n"
        f"second sentence: {frames[1].format(' '.join(second))}",
    ), label


WRITERS: dict[str, tuple[tuple[str, ...], Writer]] = {
    "topic": (tuple(TOPICS), _topic),
    "entity": (tuple(ENTITIES), _entity),
    "sentiment": (tuple(OPINIONS), _sentiment),
    "inference": (("neutral", "entailment", "contradiction"), _inference),
    "question": (("True", "False"), _question),
    "sense": (("True", "False"), _sense),
    "extraction": (("where", "when"), _extraction),
    "paraphrase": (("False", "True"), _paraphrase),
}
NAMES = tuple(WRITERS)
STREAM = ("entity", "sentiment", "inference", "sense", "topic")
