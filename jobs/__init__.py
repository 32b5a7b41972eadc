"""How many at once: each job is one file that reads from top to bottom as its story."""
