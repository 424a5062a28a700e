"""Make neural networks smaller and faster by removing parts of them."""
