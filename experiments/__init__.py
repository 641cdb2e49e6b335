"""Why is it built so? The papers' tables in miniature, measurements of speed, pictures drawn by other code."""
