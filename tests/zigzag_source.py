"""FlexGen's block schedule as its loops have it: what happens to token step i, layer j and batch k, in which order."""

from __future__ import annotations

from typing import NamedTuple

LOAD_WEIGHT, LOAD_CACHE, LOAD_HIDDEN = "load_weight", "load_cache", "load_hidden"
COMPUTE, STORE_CACHE, STORE_HIDDEN, SYNC = "compute", "store_cache", "store_hidden", "sync"


class Event(NamedTuple):
    what: str
    i: int
    j: int
    k: int


class Block:
    """n_steps token steps of n_layers layers and n_batches batches. Calls that do nothing in the source give no event.

    Weights come with the first batch and serve all. The first step has no keys and values to load, the last one none
    to store.
    """

    def __init__(self, n_steps, n_layers, n_batches):
        self.n_steps, self.n_layers, self.n_batches = n_steps, n_layers, n_batches

    def events(self, *, overlap=True):
        if not overlap:
            yield from self._in_strict_order()
        elif self.n_batches == 1:
            yield from self._single()
        else:
            yield from self._several()

    def _several(self):
        yield from self._does(LOAD_WEIGHT, 0, 0, 0)
        yield from self._does(LOAD_HIDDEN, 0, 0, 0)
        yield Event(SYNC, -1, -1, -1)
        for i, j, k in self._places():
            yield from self._does(LOAD_WEIGHT, i, j + 1, k)
            yield from self._does(LOAD_CACHE, i, j, k + 1)
            yield from self._does(STORE_HIDDEN, i, j, k - 1)
            yield from self._does(LOAD_HIDDEN, i, j, k + 1)
            yield Event(COMPUTE, i, j, k)
            yield from self._does(STORE_CACHE, i, j, k - 1)
            yield Event(SYNC, i, j, k)
        yield from self._does(STORE_HIDDEN, self.n_steps - 1, self.n_layers - 1, self.n_batches - 1)

    def _single(self):
        yield from self._does(LOAD_WEIGHT, 0, 0, 0)
        yield Event(SYNC, -1, -1, -1)
        for i, j, _ in self._places():
            yield from self._does(LOAD_WEIGHT, i, j + 1, 0)
            yield from self._does(LOAD_CACHE, i, j + 1, 0)
            yield from self._does(LOAD_HIDDEN, i, j, 0)
            yield Event(COMPUTE, i, j, 0)
            yield from self._does(STORE_CACHE, i, j - 1, 0)
            yield from self._does(STORE_HIDDEN, i, j, 0)
            yield Event(SYNC, i, j, 0)

    def _in_strict_order(self):
        for i, j, k in self._places():
            yield from self._does(LOAD_WEIGHT, i, j, k)
            yield from self._does(LOAD_CACHE, i, j, k)
            yield from self._does(LOAD_HIDDEN, i, j, k)
            yield Event(COMPUTE, i, j, k)
            yield from self._does(STORE_HIDDEN, i, j, k)
            yield from self._does(STORE_CACHE, i, j, k)

    def _places(self):
        return ((i, j, k) for i in range(self.n_steps) for j in range(self.n_layers) for k in range(self.n_batches))

    def _does(self, what, i, j, k):
        """The event, its place wrapped around; none where the source returns at once."""
        place = (i * self.n_layers + j) * self.n_batches + k
        i, rest = divmod(place, self.n_layers * self.n_batches)
        j, k = divmod(rest, self.n_batches)
        nothing = {LOAD_WEIGHT: k > 0, LOAD_CACHE: i == 0, STORE_CACHE: i == self.n_steps - 1}.get(what, False)
        if 0 <= i < self.n_steps and not nothing:
            yield Event(what, i, j, k)
