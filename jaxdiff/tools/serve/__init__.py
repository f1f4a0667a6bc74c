"""A page to try a model: prompts, sliders, masks drawn by hand, and images as they come into being."""
