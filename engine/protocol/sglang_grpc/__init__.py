"""SGLang's scheduler over gRPC: messages of the published ``sglang_scheduler.proto`` (PyPI: smg-grpc-proto).

It speaks tokens, and no text: whoever asks, a gateway mostly, tokenizes and writes text itself.
"""
