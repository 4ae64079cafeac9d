"""SGLang's own ``/generate``, as its documentation has it (https://docs.sglang.ai, "Sampling Parameters")."""
