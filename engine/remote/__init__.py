"""An engine in a process of its own, and the boundary to it.

    messages   what the two sides say to each other; nothing else crosses the boundary
    channel    messages over a stream socket, for a side that polls
    pace       when a full queue has room again
    host       the engine's side: a process that loads a model, takes requests in and sends tokens out, once a step
    client     the other side, under asyncio: text is made here, from tokens

A request crosses as token ids, and its text never does. Both sides hold the same sequence: what is sampled and why
it ended follow from the same tokens, so that a step has one small message for all rows.
"""
