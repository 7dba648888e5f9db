"""Runners of other libraries' training steps on the same weights and the same replay."""
