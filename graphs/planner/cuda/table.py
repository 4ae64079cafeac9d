"""What a plan's compiled kernels need, as text. Imports no compiler."""

from __future__ import annotations

from makeready.graphs.plan.plan import Plan


def resource_table(plan: Plan) -> str:
    """One line a kernel: threads of a block, registers and local memory of a thread, shared memory, size.

    A star marks kernels that wait on the device for the kernels before them. Below are the ways to run a call
    that the target has too little of something for.
    """
    used: dict[str, set[str]] = {key: set() for key in plan.binaries}
    loading = [] if plan.loading is None else [load.program for load in plan.loading.programs]
    for program in (*plan.programs.values(), *loading):
        for one in program.classes:
            for choices in one.candidates.values():
                for node in (node for choice in choices for node in choice.nodes):
                    used[node.binary].add(one.op)
    rows = [("kernel", "threads", "registers", "spilled", "shared KiB", "code KiB", "runs")]
    for key, binary in plan.binaries.items():
        rows.append(
            (
                key + ("*" if binary.dependent else ""),
                str(32 * binary.warps),
                str(binary.registers),
                str(binary.spill_bytes),
                f"{binary.shared / 1024:.1f}",
                f"{len(plan.cubins[key]) / 1024:.1f}",
                ", ".join(sorted(used[key])),
            )
        )
    total = sum(len(code) for code in plan.cubins.values())
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    lines = [
        "  ".join(
            [
                row[0].ljust(widths[0]),
                *(c.rjust(w) for c, w in zip(row[1:-1], widths[1:], strict=True)),
                row[-1],
            ]
        )
        for row in rows
    ]
    dropped = [f"left out: {reason}" for reason in plan.dropped]
    return "\n".join([*lines, f"{len(plan.binaries)} kernels, {total / 2**20:.1f} MiB", *dropped])
