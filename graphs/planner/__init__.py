"""From a checkpoint to a plan: trace, rewrite, place, compile."""
