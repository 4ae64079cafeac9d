"""Text in and out: tokenize, chat templates, detokenize, stop strings."""
