"""Paired evaluation of a candidate against the champion, and its statistics."""
