"""Many images: files of prompts, what is drawn together, and the folder that they are kept in."""
