"""Answers in letters: each token is a letter of a tiny alphabet, and where the answer is follows from plain strings."""

from austeer.steering.markers import Answer

#: The token of a letter: 3 for a, 4 for b and so on; 0, 1 and 2 are special in the tiny models.
FIRST = 3


def tokens_of(text):
    return tuple(FIRST + ord(letter) - ord("a") for letter in text)


def answer_of(start=(), pauses=(), turn=()):
    """The answer with markers in letters; a pause is two of them."""
    return Answer(
        tuple(map(tokens_of, start)),
        tuple(((tokens_of(opens),), (tokens_of(closes),)) for opens, closes in pauses),
        tuple(map(tokens_of, turn)),
    )


def letters_in_answer(text, start=(), pauses=(), turn=()):
    """For each letter of a text whether it is in the answer: by searching the text for the next marker's end."""
    found, at, waiting = [], 0, "start" if start else "open"
    while True:
        marks = dict.fromkeys(turn, "start" if start else "open")
        if waiting == "start":
            marks |= {mark: "open" for mark in start if mark not in marks}
        elif waiting == "open":
            marks |= {opens: closes for opens, closes in pauses if opens not in marks}
        else:
            marks |= {waiting: "open"} if waiting not in marks else {}
        ends = [(text.find(mark, at) + len(mark), -len(mark), mark) for mark in marks if text.find(mark, at) >= 0]
        stop = min(ends)[0] if ends else len(text) + 1
        found += [waiting == "open"] * (min(stop - 1, len(text)) - len(found))
        if not ends:
            return found
        at, waiting = stop, marks[min(ends)[2]]
