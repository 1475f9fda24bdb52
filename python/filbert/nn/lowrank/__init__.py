"""Linear layers and feed-forward parts whose weights are products of thin factors."""
