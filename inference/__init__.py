"""How does it answer fast? The same model in the form that a CPU or a GPU runs best."""
