"""The training step and what surrounds it; `train.py` is the loop."""
