"""Flax leaves without model names: layers, attention, and the blocks that networks are stacked from."""
