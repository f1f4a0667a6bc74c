"""How fast the networks run on the machine at hand: `python -m jaxdiff.tools.bench unet --model sd15`."""
