"""Reports on runs, before and after training: a verdict with its evidence, and implicit rewards of pairs."""
