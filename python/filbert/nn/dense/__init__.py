"""Float layers: packed weights, what multiplies with them, and attention between them."""
