"""What a plan says, for people: figures (analysis, padding), text, and one HTML page."""
