"""What a plan says: all that the runtime reads, with no torch."""
