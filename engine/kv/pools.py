"""The pools of a plan's cache groups, by what is kept of each."""

from __future__ import annotations

from collections.abc import Mapping

from makeready.engine.kv.counted import Counted
from makeready.engine.kv.pool import PagePool
from makeready.graphs.plan.spec import CacheSpec


class Pools:
    """A pool for every cache group.

    Args:
        cache: the plan's.
        blocks: of each group, the null block included.
        policy: of eviction.

    Attributes:
        first: of the first group.
        full: of groups that keep every page of a sequence.
        windows: of groups that keep the last pages.
        states: of groups whose block is a whole sequence's state.
        lists, grows: slot and step fields of the page lists of ``full``, then of ``windows``.
        state_fields: step fields of ``states``, where they are read and written.
    """

    def __init__(self, cache: CacheSpec, blocks: Mapping[str, int], policy: str = "lru") -> None:
        self.cache = cache
        self.by_name = {group.name: PagePool(blocks[group.name]) for group in cache.groups}
        self.first = self.by_name[cache.groups[0].name]
        full = [group for group in cache.paged if not group.window]
        windows = [group for group in cache.paged if group.window]
        self.full = tuple(self.by_name[group.name] for group in full)
        self.windows = tuple(Counted(self.by_name[g.name], policy, g.tail) for g in windows)
        self.states = tuple(Counted(self.by_name[group.name], policy) for group in cache.states)
        self.lists = tuple(cache.field(group.name, "pages") for group in (*full, *windows))
        self.grows = tuple(cache.field(group.name, "grow_page") for group in (*full, *windows))
        self.state_fields = tuple(
            (cache.field(group.name, "state_in"), cache.field(group.name, "state_out"))
            for group in cache.states
        )

    @property
    def counted(self) -> tuple[Counted, ...]:
        """Groups whose blocks are held one by one."""
        return self.windows + self.states

    def check(self) -> None:
        """Assert that every block of every group is exactly one of free, cached, held."""
        for pool in self.by_name.values():
            pool.check()
