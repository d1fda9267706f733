"""What the tests compare with: plain PyTorch, one thing at a time, sharing no code with what is tested."""
