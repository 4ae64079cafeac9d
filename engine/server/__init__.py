"""HTTP in front of an engine's process: requests of several protocols in, answers and streams out.

    settings   what a server is told
    service    what all protocols share: from what a body asks for to the pieces of its answer
    problem    what goes wrong, with its HTTP status
    route      a route, and what is done for each of them: access, body, errors, clients that leave
    routes     one file a protocol
    app        all routes as an ASGI application
    run        the process: listen, drain, end

What a protocol's bodies and answers look like is in ``engine/protocol``. Needs the extra ``serve``.
"""
