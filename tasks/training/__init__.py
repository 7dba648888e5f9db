"""From a pinned dataset version to a new agent: the off-policy trainer, its checkpoints and its export."""
