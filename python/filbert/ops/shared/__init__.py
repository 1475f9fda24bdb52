"""What the operators share: the record of one, calls, words of bits."""
