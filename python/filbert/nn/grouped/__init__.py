"""Linear layers of 2, 3, 4, 6 and 8 bits."""
