"""What surrounds a computation: devices, processes, compiled programs, command lines."""
