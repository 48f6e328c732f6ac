"""Comparing methods: encoded once, measured alike, reported together."""
