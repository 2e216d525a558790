"""A tokenizer of letters, for the 64 tokens of the tiny models: it makes 10,000 texts a moment, and needs no file."""


class Letters:
    """One token a character, from 3 on: 0, 1 and 2 are special to the tiny models."""

    bos_token_id = eos_token_id = None
    eos_token = None

    def __call__(self, texts, **options):
        return {"input_ids": [[3 + ord(letter) % 61 for letter in text] for text in texts]}


def letter_pairs(count):
    """Pairs of unlike lengths, of which several share a prompt or a part of one."""
    parts = ["the soup was", "the soup", "a view of the river and its boats"]
    return [
        (parts[i % 3] + " ab"[: i % 4], " " + "good"[: 1 + i % 4] + "xyz"[i % 3], " bad" + "uvw"[i % 3] * (i % 5))
        for i in range(count)
    ]
