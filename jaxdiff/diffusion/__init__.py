"""The mathematics of diffusion: arrays in, arrays out."""
