"""Gated delta net: a short convolution and a recurrence whose states stand where others have keys and values."""
