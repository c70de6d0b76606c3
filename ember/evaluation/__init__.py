"""Scores with intervals: question sets and texts, search of a grid, damage token by token, trade-offs, stability."""
