"""Small commands beside the road: check data, export a model, plot a log."""
