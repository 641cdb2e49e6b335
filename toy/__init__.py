"""What is the default world? Pictures of shapes, questions about them, and small stand-ins for CLIP and Vicuna."""
