"""Files: weights, names, folders, pictures and checkpoints."""
