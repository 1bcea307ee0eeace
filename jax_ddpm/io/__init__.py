"""What is on the disk: files that are whole or not there, arrays, JSON, checkpoints."""
