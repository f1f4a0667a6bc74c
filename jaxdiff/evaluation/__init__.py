"""Measures of a model: how well it knows what it was trained on, and what it draws."""


def check_count(name: str, value: int) -> None:
    """Refuses numbers of images below 1."""
    if value < 1:
        raise ValueError(f"{name} is {value}; it must be at least 1.")
