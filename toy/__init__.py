"""What is the default world? Shapes, questions about them, and stand-ins for CLIP and Vicuna."""
