"""The server's gRPC, where ``grpc_port`` asks for it; needs the extra ``grpc``.

    server       listens, and ends
    scheduler    SGLang's scheduler service: sglang.grpc.scheduler.SglangScheduler
    told         answers about the server itself
    calls        keys and errors of a call

What is done for a request is that of HTTP (``engine/server/work.py``): only messages are others.
"""
