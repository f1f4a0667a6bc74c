"""What is trained: each task gives its first parameters, its frozen ones and its loss."""
