"""What the embedded model is pretrained on: plain text, and exercises on it.

The text has the words and the sentences of the embedded tasks but none of their questions
and labels. The exercises teach to read an instruction, to look up, to compare, to copy.
"""

import pathlib
import random
from collections.abc import Callable, Sequence

from aim_jax.data import synthetic

WORDS = (pathlib.Path(__file__).parent / "words.txt").read_text().split()
LEXICON = [
    *" ".join(
        text
        for group in (synthetic.TOPICS, synthetic.ENTITIES, synthetic.OPINIONS)
        for text in group.values()
    ).split(),
    *synthetic.STATES,
    *synthetic.REPORTS,
    *synthetic.TITLES,
]
FOODS = "rice soup bread apple cake cheese meat salad egg butter".split()
KINDS = {
    "animal": synthetic.ANIMALS,
    "colour": synthetic.COLOURS,
    "place": synthetic.PLACES,
    "thing": synthetic.THINGS,
    "food": FOODS,
    "city": synthetic.CITIES,
    "day": synthetic.DAYS,
    "name": synthetic.PEOPLE,
}
NUMBERS = "zero one two three".split()
ORDINALS = "first second third fourth".split()
OPPOSITES = (
    "hot cold, big small, old new, early late, long short, open close, buy sell, rich poor,"
    " black white, day night, first last, win lose, easy hard, fast slow, start stop,"
    " high low, push pull, give take, man woman, question answer, before after,"
    " always never, summer winter, north south, friend enemy, happy sad, strong weak,"
    " remember forget, same different, war peace, up down, left right"
)
PAIRS = [tuple(pair.split()) for pair in OPPOSITES.split(", ")]


def text(rng: random.Random) -> str:
    """A paragraph for span corruption: its parts tell about each other."""
    return synthetic.pick(rng, TEXTS)(rng)


def exercise(rng: random.Random) -> tuple[str, str, str]:
    """Name, input and output of an exercise."""
    name = synthetic.pick(rng, list(EXERCISES))
    return name, *EXERCISES[name](rng)


def _reports(rng: random.Random) -> str:
    nouns = synthetic.pick(rng, list(synthetic.TOPICS.values())).split()
    return synthetic.report(rng, synthetic.shuffled(rng, nouns)[:6])


def _descriptions(rng: random.Random) -> str:
    words = synthetic.pick(rng, list(synthetic.ENTITIES.values())).split()
    kinds = synthetic.shuffled(rng, words[:4])
    traits = synthetic.shuffled(rng, words[4:])
    first = synthetic.description(rng, kinds[0], traits[:2])
    return f"{first} {synthetic.description(rng, kinds[1], traits[2:4])}"


def _reviews(rng: random.Random) -> str:
    words = synthetic.pick(rng, list(synthetic.OPINIONS.values())).split()
    words = synthetic.shuffled(rng, words)
    return f"{synthetic.review(rng, words[:2])} {synthetic.review(rng, words[2:4])}"


def _sighting(rng: random.Random) -> str:
    name, animal, colour, place, state = (
        synthetic.pick(rng, words)
        for words in (
            synthetic.PEOPLE,
            synthetic.ANIMALS,
            synthetic.COLOURS,
            synthetic.PLACES,
            synthetic.STATES,
        )
    )
    follows = (
        f"The {animal} was {colour}.",
        f"The {animal} was in the {place}.",
        f"The {animal} was {state}, so {name} left.",
        f"{name} was in the {place}.",
    )
    first = f"{name} saw a {colour} {animal} in the {place}."
    return " ".join([first, *synthetic.shuffled(rng, follows)[:2]])


def _facts(rng: random.Random) -> str:
    things = synthetic.shuffled(rng, synthetic.THINGS)[:2]
    places = synthetic.shuffled(rng, synthetic.PLACES)
    facts = [f"The {t} is in the {p}." for t, p in zip(things, places, strict=False)]
    return " ".join([*facts, synthetic.pick(rng, facts)])


def _purchase(rng: random.Random) -> str:
    name, thing, city, day = (
        synthetic.pick(rng, words)
        for words in (
            synthetic.PEOPLE,
            synthetic.THINGS,
            synthetic.CITIES,
            synthetic.DAYS,
        )
    )
    return (
        f"{name} bought a {thing} in {city} on {day}. On {day} {name} was in {city} to"
        f" buy a {thing}."
    )


def _uses(rng: random.Random) -> str:
    uses = synthetic.pick(rng, synthetic.pick(rng, list(synthetic.SENSES.values())))
    return " ".join(
        f"{synthetic.pick(rng, synthetic.PEOPLE)} {use}."
        for use in synthetic.shuffled(rng, uses)
    )


def _intents(rng: random.Random) -> str:
    verbs = synthetic.pick(rng, list(synthetic.INTENTS))
    thing = synthetic.pick(rng, synthetic.INTENTS[verbs].split(", "))
    first, second = synthetic.shuffled(rng, synthetic.QUESTIONS)[:2]
    verbs = synthetic.shuffled(rng, verbs)
    return (
        f"{first.format(f'{verbs[0]} {thing}')} {second.format(f'{verbs[1]} {thing}')}"
    )


TEXTS = (
    _reports,
    _descriptions,
    _reviews,
    _sighting,
    _facts,
    _purchase,
    _uses,
    _intents,
)


def _words(rng: random.Random, low: int, high: int) -> list[str]:
    """From `low` to `high` different words, of the text more often than of any other."""
    source = WORDS if rng.random() < 0.2 else LEXICON + kinds()
    found: dict[str, None] = {}
    size = low + int(rng.random() * (high - low + 1))
    while len(found) < size:
        found[synthetic.pick(rng, source)] = None
    return list(found)


def kinds() -> list[str]:
    return [word for words in KINDS.values() for word in words]


def _ask(question: str, words: Sequence[str]) -> str:
    return f"{question}\nText: {' '.join(words)}\nAnswer:"


def _after(rng: random.Random) -> tuple[str, str]:
    words = _words(rng, 2, 8)
    i = int(rng.random() * (len(words) - 1))
    return _ask(f"Which word comes after {words[i]}?", words), words[i + 1]


def _before(rng: random.Random) -> tuple[str, str]:
    words = _words(rng, 2, 8)
    i = int(rng.random() * (len(words) - 1))
    return _ask(f"Which word comes before {words[i + 1]}?", words), words[i]


def _position(rng: random.Random) -> tuple[str, str]:
    words = _words(rng, 4, 6)
    i = int(rng.random() * 5) - 1
    which = "last" if i < 0 else ORDINALS[i]
    return _ask(f"What is the {which} word?", words), words[i]


def _repeat(rng: random.Random) -> tuple[str, str]:
    words = _words(rng, 1, 3)
    return _ask("Repeat the text.", words), " ".join(words)


def _missing(rng: random.Random) -> tuple[str, str]:
    words = _words(rng, 2, 6)
    word = synthetic.pick(rng, words)
    rest = [w for w in synthetic.shuffled(rng, words) if w != word]
    question = (
        f"Which word of the sentence is not in the text? Sentence: {' '.join(words)}"
    )
    return _ask(question, rest), word


def _present(rng: random.Random) -> tuple[str, str]:
    words = _words(rng, 3, 8)
    word, yes = words[0], rng.random() < 0.5
    shown = synthetic.shuffled(rng, words[not yes :])
    options = synthetic.shuffled(rng, ("yes", "no"))
    return synthetic.choose(
        f"Is the word {word} in the text?", options, f"Text: {' '.join(shown)}"
    ), "yes" if yes else "no"


def _which(rng: random.Random) -> tuple[str, str]:
    words = _words(rng, 4, 8)
    options = synthetic.shuffled(rng, words[:3])
    shown = synthetic.shuffled(rng, words[2:])
    return synthetic.choose(
        "Which word is in the text?", options, f"Text: {' '.join(shown)}"
    ), words[2]


def _kind(rng: random.Random) -> tuple[str, str]:
    options = synthetic.shuffled(rng, list(KINDS))[:4]
    kind = synthetic.pick(rng, options)
    return synthetic.choose(
        "What kind of word is in the text?",
        options,
        f"Text: {synthetic.pick(rng, KINDS[kind])}",
    ), kind


def _find(rng: random.Random) -> tuple[str, str]:
    kind = synthetic.pick(rng, list(KINDS))
    word = synthetic.pick(rng, KINDS[kind])
    rest = [synthetic.pick(rng, KINDS[k]) for k in KINDS if k != kind]
    words = synthetic.shuffled(rng, [word, *synthetic.shuffled(rng, rest)[:4]])
    return _ask(f"Which word is a {kind}?", words), word


def _alike(rng: random.Random) -> tuple[str, str]:
    kinds, yes = synthetic.shuffled(rng, list(KINDS)), rng.random() < 0.5
    first, second = synthetic.shuffled(rng, KINDS[kinds[0]])[:2]
    if not yes:
        second = synthetic.pick(rng, KINDS[kinds[1]])
    options = synthetic.shuffled(rng, ("same", "different"))
    return synthetic.choose(
        "Are the two words of the same kind?", options, f"Text: {first} {second}"
    ), "same" if yes else "different"


def _odd(rng: random.Random) -> tuple[str, str]:
    kinds = synthetic.shuffled(rng, list(KINDS))
    odd = synthetic.pick(rng, KINDS[kinds[1]])
    words = [*synthetic.shuffled(rng, KINDS[kinds[0]])[:3], odd]
    return _ask("Which word is different?", synthetic.shuffled(rng, words)), odd


def _opposite(rng: random.Random) -> tuple[str, str]:
    pair = synthetic.shuffled(rng, synthetic.pick(rng, PAIRS))
    wrong = [w for p in synthetic.shuffled(rng, PAIRS)[:2] for w in p if w not in pair][
        :2
    ]
    options = synthetic.shuffled(rng, [pair[1], *wrong])
    return synthetic.choose(
        "What is the opposite of the word?", options, f"word: {pair[0]}"
    ), pair[1]


def _count(rng: random.Random) -> tuple[str, str]:
    kind = synthetic.pick(rng, list(KINDS))
    number = int(rng.random() * len(NUMBERS))
    rest = [synthetic.pick(rng, KINDS[k]) for k in KINDS if k != kind]
    words = synthetic.shuffled(rng, KINDS[kind])[:number]
    words += synthetic.shuffled(rng, rest)[: 5 - number]
    return synthetic.choose(
        f"How many words of the kind {kind} are in the text?",
        NUMBERS,
        f"Text: {' '.join(synthetic.shuffled(rng, words))}",
    ), NUMBERS[number]


def _holders(rng: random.Random, size: int) -> tuple[list[str], list[str], str]:
    """People, what each of them has, and sentences that say so."""
    things = synthetic.THINGS + synthetic.ANIMALS + FOODS
    names = synthetic.shuffled(rng, synthetic.PEOPLE)[:size]
    things = synthetic.shuffled(rng, things)[:size]
    story = [f"{n} has the {t}." for n, t in zip(names, things, strict=True)]
    return names, things, " ".join(story)


def _holder(rng: random.Random) -> tuple[str, str]:
    names, things, story = _holders(rng, 2 + int(rng.random() * 3))
    if rng.random() < 0.5:
        return _ask(f"question: who has the {things[0]}", [story]), names[0]
    return _ask(f"question: what does {names[0]} have", [story]), things[0]


def _statement(rng: random.Random) -> tuple[str, str]:
    names, things, story = _holders(rng, 1 + int(rng.random() * 3))
    asked = int(rng.random() * len(names))
    right = rng.random() < 0.5
    claims = [things[asked]]
    if not right:
        rest = [t for t in things if t != things[asked]]
        claims = rest if rest and rng.random() < 0.5 else synthetic.THINGS
        claims = [c for c in claims if c != things[asked]]
    claim = f"{names[asked]} has the {synthetic.pick(rng, claims)}"
    options = synthetic.shuffled(rng, ("right", "wrong"))
    return synthetic.choose(
        "Is the statement right or wrong?",
        options,
        f"statement: {claim}\nText: {story}",
    ), "right" if right else "wrong"


def _equal(rng: random.Random) -> tuple[str, str]:
    first = _words(rng, 2, 6)
    second, same = list(first), rng.random() < 0.5
    if not same:
        *rest, new = first
        second = [*rest, synthetic.other(rng, WORDS, *first)]
        first = [*rest, new]
        order = synthetic.shuffled(rng, range(len(first)))
        first, second = ([words[i] for i in order] for words in (first, second))
    options = synthetic.shuffled(rng, ("same", "different"))
    return synthetic.choose(
        "Are the two sentences the same?",
        options,
        f"first: {' '.join(first)}\nsecond: {' '.join(second)}",
    ), "same" if same else "different"


def _together(rng: random.Random) -> tuple[str, str]:
    groups = [
        text.split()
        for group in (synthetic.TOPICS, synthetic.ENTITIES, synthetic.OPINIONS)
        for text in group.values()
    ]
    groups = synthetic.shuffled(rng, groups)
    words = synthetic.shuffled(rng, groups[0])[:4]
    yes = rng.random() < 0.5
    if not yes:
        words[2:] = synthetic.shuffled(rng, groups[1])[:2]
    options = synthetic.shuffled(rng, ("yes", "no"))
    return synthetic.choose(
        "Do the words belong together?", options, f"Text: {' '.join(words)}"
    ), "yes" if yes else "no"


EXERCISES: dict[str, Callable[[random.Random], tuple[str, str]]] = {
    "word after": _after,
    "word before": _before,
    "word by position": _position,
    "repeat": _repeat,
    "missing word": _missing,
    "is it there": _present,
    "which is there": _which,
    "kind of word": _kind,
    "word of a kind": _find,
    "same kind": _alike,
    "odd one out": _odd,
    "opposite": _opposite,
    "count": _count,
    "who has what": _holder,
    "statement": _statement,
    "same sentence": _equal,
    "belong together": _together,
}
