"""Where guesses come from, one file a method of speculative decoding. See base.py."""
