"""Small commands that are not needed for training: check data, export a model, draw loss curves."""
