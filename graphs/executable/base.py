"""What the engine sees of a backend: batches go in, tokens come out. No torch, no layer, no kernel name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from makeready.graphs.plan.plan import Plan
from makeready.graphs.plan.spec import Bucket


class Pending(Protocol):
    """A launched step whose results may not be there yet."""

    def wait(self) -> Mapping[str, np.ndarray]:
        """Arrays of the kind of step's results, of the bucket's shapes; blocks until written."""
        ...

    def early(self) -> Mapping[str, np.ndarray]:
        """Of a step that stands at its cut, those results that are early; blocks until they are written."""
        ...


class Executable(Protocol):
    """A loaded plan with its weights and its KV pages.

    Attributes:
        plan: what was loaded.
        pages: KV pages of the first cache group, page 0 (which belongs to nobody) included.
        blocks: blocks of every cache group by its name, block 0 included.
        asynchronous: ``launch`` returns before the step has run; the host has that time for the next one.

    Steps and writes to slots take effect in the order in which they are asked for. Within a step, keys and
    values of all rows are written before any row attends: a row may read pages that another one fills. A state
    (``state_in``) is read as the steps before left it, and rows of padding write none.
    """

    plan: Plan
    pages: int
    blocks: Mapping[str, int]
    asynchronous: bool

    def write_slot(self, slot: int, values: Mapping[str, Any]) -> None:
        """Set fields of ``plan.slots`` for one slot; the host's fields that are not named take their default.

        Of a field that the device keeps (``history``, ``pages``) the first entries are set, as many as are
        given; the others are left as they are. A request's slot is written before its first step, and again
        where a chunk of its prompt needs more pages than a step can tell of.
        """
        ...

    def launch(self, bucket: Bucket, step: Mapping[str, np.ndarray], *, cut: bool = False) -> Pending:
        """Start the program of ``bucket``.

        Args:
            bucket: one of the plan's.
            step: an array of the bucket's shape for every field that the kind of step stages. They may be
                reused as soon as this returns.
            cut: start only what comes before the program's cut; :meth:`resume` starts the rest. Results must not be
                waited for, and slots not be written, before that.
        """
        ...

    def resume(self, late: Mapping[int, Mapping[str, Any]]) -> None:
        """Start what a step that was launched with a ``cut`` has left; does nothing where there is none.

        Args:
            late: by slot, late fields to set before; what is given is a field's beginning.
        """
        ...

    def close(self) -> None:
        """Give all memory back, on the device and pinned on the host; does nothing the second time.

        Steps under way are waited for. Nothing can be launched afterwards; results that were not read are lost.
        """
        ...
