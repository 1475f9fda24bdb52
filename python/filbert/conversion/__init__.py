"""Models in place: encoders are found, read, swapped for packed ones, proven and reported."""
