"""Ways to run the engine: batch jobs, later servers."""
