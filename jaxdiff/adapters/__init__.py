"""Small trees that change the networks: merged into their params."""
