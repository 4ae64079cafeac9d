"""Who owns which KV page.

**Every page is always exactly one of free, cached, held.** Page 0 is none of them: it belongs to nobody,
and padding tokens write there.

    free     in no page table; its content means nothing
    cached   in no page table; its content is a known prefix
    held     in the page table of at least one running sequence:
                 owned    of one sequence, which alone may write to it and gives it back by itself
                 shared   a page of the prefix cache, held by whoever reads it; nobody writes to it

           take             share             park              drop
    free ───────▶ owned ───────────▶ shared ────────▶ cached ────────▶ free
           ◀───────      ◀───────────       ◀────────
           release            own             hold

Every cache group has a pool of its own. A block that is the state of a whole sequence is a page to it.
"""

from __future__ import annotations

import numpy as np

from makeready.engine.errors import RequestError

NULL_PAGE = 0

_NOBODY, _FREE, _CACHED, _OWNED, _SHARED = range(5)


class PagePool:
    """Hands out page numbers ``1 .. pages - 1`` and takes them back.

    ``take`` and ``release`` are for pages that one sequence owns; the other moves are the prefix cache's.
    """

    def __init__(self, pages: int) -> None:
        if pages < 2:
            raise RequestError(f"{pages} KV pages leave none to use; give kv.pages at least 2")
        self.pages = pages
        # Last freed is first reused: its lines are the likeliest to be in a cache.
        self._free = list(range(pages - 1, NULL_PAGE, -1))
        self._cached = 0
        self._state = np.full(pages, _FREE, np.uint8)
        self._state[NULL_PAGE] = _NOBODY

    @property
    def free(self) -> int:
        """Pages that :meth:`take` can give at once."""
        return len(self._free)

    @property
    def cached(self) -> int:
        """Pages that the prefix cache keeps for nobody in particular, and would free on demand."""
        return self._cached

    @property
    def held(self) -> int:
        """Pages in use."""
        return self.usable - self.free - self.cached

    @property
    def usable(self) -> int:
        """Pages that there are for sequences, used or not."""
        return self.pages - 1

    def take(self, count: int) -> list[int]:
        """Own ``count`` free pages; the caller has made sure that there are as many."""
        assert 0 <= count <= self.free, (count, self.free)
        rest = len(self._free) - count
        taken = self._free[rest:][::-1]
        del self._free[rest:]
        self._move(taken, _FREE, _OWNED)
        return taken

    def release(self, pages: list[int]) -> None:
        """Free pages that one sequence owned."""
        self._move(pages, _OWNED, _FREE)
        self._free += pages

    def share(self, pages: list[int]) -> None:
        """Owned pages become pages of the prefix cache, which their owner still holds."""
        self._move(pages, _OWNED, _SHARED)

    def own(self, pages: list[int]) -> None:
        """Shared pages that one sequence holds are its own again."""
        self._move(pages, _SHARED, _OWNED)

    def park(self, pages: list[int]) -> None:
        """Nobody holds these shared pages any more: they are cached."""
        self._move(pages, _SHARED, _CACHED)
        self._cached += len(pages)

    def hold(self, pages: list[int]) -> None:
        """Somebody holds these cached pages again."""
        self._move(pages, _CACHED, _SHARED)
        self._cached -= len(pages)

    def drop(self, pages: list[int]) -> None:
        """Free cached pages."""
        self._move(pages, _CACHED, _FREE)
        self._cached -= len(pages)
        self._free += pages

    def check(self) -> None:
        """Assert that every page but the null page is exactly one of free, cached, held."""
        assert self._state[NULL_PAGE] == _NOBODY, "the null page is in use"
        free = np.sort(np.array(self._free, np.int64))
        assert np.array_equal(free, np.flatnonzero(self._state == _FREE)), "a page is lost or owned twice"
        assert self._cached == np.count_nonzero(self._state == _CACHED), "the count of cached pages is wrong"

    def _move(self, pages: list[int], source: int, target: int) -> None:
        if len(pages) == 1:  # most calls while decoding; indexing by a list costs ten times as much
            (page,) = pages
            assert self._state[page] == source, f"page {page} is not in the state that it should leave"
            self._state[page] = target
            return
        at = np.array(pages, np.intp)
        assert (self._state[at] == source).all(), "a page is not in the state that it should leave"
        self._state[at] = target
