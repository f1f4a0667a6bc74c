"""Files: weights, names, folders, images and checkpoints."""
