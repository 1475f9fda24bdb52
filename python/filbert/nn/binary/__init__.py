"""One-bit layers: weights and activations as bits, attention between them, and BERT of them."""
