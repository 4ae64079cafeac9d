"""Who owns which KV page.

**Every page is always exactly one of free, cached, held.** Page 0 is none of them: it belongs to nobody,
and padding tokens write there.

    free     in no page table; its content means nothing
    cached   in no page table; its content is a known prefix       (no page is, without a prefix cache)
    held     in the page table of at least one running request
"""

from __future__ import annotations

from makeready.engine.errors import RequestError

NULL_PAGE = 0


class PagePool:
    """Hands out page numbers ``1 .. pages - 1`` and takes them back."""

    def __init__(self, pages: int) -> None:
        if pages < 2:
            raise RequestError(f"{pages} KV pages leave none to use; give kv.pages at least 2")
        self.pages = pages
        # Last freed is first reused: its lines are the likeliest to be in a cache.
        self._free = list(range(pages - 1, NULL_PAGE, -1))
        self._held: set[int] = set()

    @property
    def free(self) -> int:
        """Pages that :meth:`take` can still give."""
        return len(self._free)

    @property
    def held(self) -> int:
        """Pages in use."""
        return len(self._held)

    @property
    def usable(self) -> int:
        """Pages that there are for requests, used or not."""
        return self.pages - 1

    def take(self, count: int) -> list[int]:
        """Hold ``count`` free pages; the caller has made sure that there are as many."""
        assert 0 <= count <= self.free, (count, self.free)
        taken = [self._free.pop() for _ in range(count)]
        self._held.update(taken)
        return taken

    def release(self, pages: list[int]) -> None:
        """Give held pages back."""
        for page in pages:
            assert page in self._held, f"page {page} is released but not held"
            self._held.remove(page)
            self._free.append(page)

    def check(self) -> None:
        """Assert that free and held pages are all pages but the null page, each once."""
        everything = sorted([*self._free, *self._held])
        assert everything == list(range(1, self.pages)), "a page is lost or owned twice"
