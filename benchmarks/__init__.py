"""How is it scored? One file per benchmark, and ways to take the experts away."""
