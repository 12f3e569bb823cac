"""Timing: layers against dense torch, and the search for the fastest variant."""
