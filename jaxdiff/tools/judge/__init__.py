"""Studies with people: which of two images fits the text, and which is better drawn."""
