"""One file a network, with the parameter names of diffusers and transformers."""
