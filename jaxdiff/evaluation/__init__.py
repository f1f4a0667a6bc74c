"""Measures of a model: how well it knows what it was trained on, and what it draws."""
