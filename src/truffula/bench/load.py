"""The load that ``truffula bench`` puts on a server or on ``LLM``: which prompts, with which adapters, and when.

Prompts are random token ids that differ from their first token on, so they do not hit the prefix cache; the
measured hit rate is printed with the results. The seed determines everything.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

MIXES = ("none", "shared", "distinct", "zipf")


@dataclass(frozen=True)
class Load:
    """The requests of a run: ``clients`` x ``requests`` prompts of ``prompt_tokens`` ids, ``max_tokens`` greedy tokens
    each.

    Client c uses ``adapters[c % len(adapters)]`` (None is the base). With ``zipf``, the exponent s, each request draws
    its adapter instead: the one of rank k with a probability in proportion to 1 / k**s.
    """

    clients: int
    requests: int
    prompt_tokens: int
    max_tokens: int
    adapters: tuple[str | None, ...]
    vocab_size: int
    seed: int = 0
    zipf: float | None = None

    def prompt(self, client: int, request: int) -> list[int]:
        rng = random.Random(f"{self.seed}/{client}/{request}")
        top = max(3, self.vocab_size - 1)
        return [rng.randrange(2, top) for _ in range(self.prompt_tokens)]

    def adapter(self, client: int, request: int = 0) -> str | None:
        if not self.adapters:
            return None
        if self.zipf is None:
            return self.adapters[client % len(self.adapters)]
        rng = random.Random(f"{self.seed}/adapter/{client}/{request}")
        return rng.choices(self.adapters, cum_weights=zipf_weights(len(self.adapters), self.zipf))[0]


def zipf_weights(count: int, exponent: float) -> list[float]:
    """Running sums of 1 / k**exponent for k = 1 .. count."""
    return list(accumulate(k**-exponent for k in range(1, count + 1)))


def arrivals(rate: float, count: int, seed: int) -> list[float]:
    """Seconds after the start at which ``count`` requests of a Poisson process of ``rate`` a second arrive, ascending.

    The first gap is random too, because the process does not start with an arrival.
    """
    rng = random.Random(f"{seed}/arrivals")
    return list(accumulate(rng.expovariate(rate) for _ in range(count)))


def used(load: Load) -> Sequence[str | None]:
    """The adapter of every request of ``load``, client after client."""
    return [load.adapter(c, r) for c in range(load.clients) for r in range(load.requests)]
