"""What the files of a checkpoint hold: schemes, tensors, and where their rows go in a model."""
