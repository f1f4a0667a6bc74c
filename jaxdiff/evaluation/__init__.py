"""What a model's images are worth: measures, each with the anchors that say what its numbers mean."""
