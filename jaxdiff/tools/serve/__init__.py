"""A page to try a model: prompts, sliders, masks drawn by hand, and pictures as they come into being."""
