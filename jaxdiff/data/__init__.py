"""Images and captions: where they come from, how they are varied, and in what order they are read."""
