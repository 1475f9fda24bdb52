"""What runs filbert for people: the command line, the embedding job and its files, the demo."""
