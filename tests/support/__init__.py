"""What the tests stand on: a network laboratory, numbered frames, and judges that we did not write."""
