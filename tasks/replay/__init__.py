"""Replay: episodes from open segments to sealed, validated, content-addressed dataset versions."""
