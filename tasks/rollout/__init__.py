"""Generating experience: decoding, and the episode loop."""
