"""Samplers and the noise levels they visit."""
