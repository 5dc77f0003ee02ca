"""Count models with Witten-Bell interpolation: the floors of language modeling, fitted in one pass and without choices.

    p(w | h) = (c(h, w) + T(h) p(w | shorter h)) / (c(h) + T(h)),    T(h): how many different tokens have followed h

and below the empty context 1 / V. A context that train has not seen leaves the decision to the shorter one.

Source: Witten and Bell 1991, https://doi.org/10.1109/18.87000; the interpolated form of Chen and Goodman 1998, section
2.5.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

FIT = 2**26  # tokens of train that are counted


def interpolated(
    train: tuple[Sequence[np.ndarray], np.ndarray], test: tuple[Sequence[np.ndarray], np.ndarray], vocab_size: int
) -> Iterator[np.ndarray]:
    """Nats of every target of test, with contexts of no token, one, two, ...: the n-th result is the model of order n.

    Args:
        train, test: (context, target); the context is a list of arrays like the target, the most telling token first.
        vocab_size: V; tokens are 0 .. V - 1.
    """
    (context, target), (asked_context, asked) = train, test
    probability = np.full(len(asked), 1 / vocab_size)
    history, asked_history = np.zeros(len(target), np.int64), np.zeros(len(asked), np.int64)
    for order in range(len(context) + 1):
        if order:
            history, asked_history = _named(
                history * vocab_size + context[order - 1], asked_history * vocab_size + asked_context[order - 1]
            )
        pairs, counts = np.unique(history * vocab_size + target, return_counts=True)
        of = pairs // vocab_size
        size = 1 + max(int(history.max(initial=0)), int(asked_history.max(initial=0)))
        followed = np.bincount(of, weights=counts, minlength=size)[asked_history]
        kinds = np.bincount(of, minlength=size)[asked_history]
        wanted = asked_history * vocab_size + asked
        place = np.minimum(np.searchsorted(pairs, wanted), len(pairs) - 1)
        count = np.where(pairs[place] == wanted, counts[place], 0)
        seen = followed > 0
        probability[seen] = ((count + kinds * probability) / np.maximum(followed + kinds, 1))[seen]
        yield -np.log(probability)


def _named(known: np.ndarray, asked: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Contexts as 0, 1, 2, ...; those that are not known share the number behind the last."""
    names, renamed = np.unique(known, return_inverse=True)
    place = np.minimum(np.searchsorted(names, asked), len(names) - 1)
    return renamed, np.where(names[place] == asked, place, len(names))


def successive(stream: np.ndarray, order: int) -> tuple[list[np.ndarray], np.ndarray]:
    """(context, target) of a stream of tokens for models up to `order`: the token before, the one before that, ...

    Where the stream begins, a token of number -1 would be needed; its place is taken by the first token.
    """
    padded = np.concatenate([np.repeat(stream[:1], max(0, order - 2)), stream]).astype(np.int64)
    skip = max(1, order - 1)
    return [padded[skip - i : len(padded) - i] for i in range(1, order)], padded[skip:]
