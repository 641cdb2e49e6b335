"""How is it scored? One file per benchmark."""
