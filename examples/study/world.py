"""The study's language: sentences of a small grammar, and three tasks that a language model can do with them."""

import torch

DETERMINERS = ["the", "this", "one", "every", "my"]
ADJECTIVES = ["big", "small", "old", "young", "red", "green", "happy", "angry", "quiet", "clever", "lazy", "tall"]
NOUNS = [
    "dog",
    "cat",
    "horse",
    "bird",
    "farmer",
    "teacher",
    "child",
    "king",
    "sailor",
    "doctor",
    "baker",
    "robot",
    "house",
    "river",
    "garden",
    "mountain",
    "window",
    "table",
    "bottle",
    "letter",
    "candle",
    "basket",
    "hammer",
    "ladder",
]
ADVERBS = ["often", "never", "slowly", "today"]
VERBS = ["sees", "likes", "finds", "paints", "carries", "follows", "draws", "holds", "loves", "hides", "moves", "takes"]
TASKS = ("repeat", "reverse", "object")
PAD, BOS, EOS, PAUSE = range(4)
SPECIAL = ["<pad>", "<bos>", "<eos>", "<pause>", *(f"<{task}>" for task in TASKS)]
VOCABULARY = [*SPECIAL, *DETERMINERS, *ADJECTIVES, *NOUNS, *ADVERBS, *VERBS]
INDEX = {token: number for number, token in enumerate(VOCABULARY)}


def sentences(count: int, seed: int, avoid: frozenset[str] = frozenset()) -> list[str]:
    """Different sentences of five to eight words, none of them in `avoid`."""
    generator = torch.Generator().manual_seed(seed)

    def pick(words: list[str], probability: float = 1.0) -> list[str]:
        """One of the words, or none."""
        taken = float(torch.rand((), generator=generator)) < probability
        return [words[int(torch.randint(len(words), (), generator=generator))]] if taken else []

    found: dict[str, None] = {}
    while len(found) < count:
        subject = pick(DETERMINERS) + pick(ADJECTIVES, 0.5) + pick(NOUNS)
        rest = pick(ADVERBS, 0.3) + pick(VERBS) + pick(DETERMINERS) + pick(ADJECTIVES, 0.5) + pick(NOUNS)
        sentence = " ".join(subject + rest)
        if sentence not in avoid:
            found[sentence] = None
    return list(found)


def answer(sentence: str, task: str) -> str:
    """The right reply of the language model: the sentence, its words backwards, or its object."""
    words = sentence.split()
    return " ".join({"repeat": words, "reverse": words[::-1], "object": words[-1:]}[task])


def encode(text: str) -> list[int]:
    """Token ids of words."""
    return [INDEX[word] for word in text.split()]


def stutter(ids: list[int], generator: torch.Generator) -> list[int]:
    """Words repeated up to three times, with pauses between some."""
    found = []
    for token in ids:
        repeats, pauses = torch.randint(1, 4, (2,), generator=generator).tolist()
        found += [token] * repeats + [PAUSE] * (pauses if pauses < 3 else 0)
    return found


def decode(ids: list[int]) -> str:
    """Words of an answer, up to its end."""
    return " ".join(VOCABULARY[i] for i in (ids[: ids.index(EOS)] if EOS in ids else ids) if i != PAD)
