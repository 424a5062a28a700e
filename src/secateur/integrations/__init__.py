"""The same rules in other people's training loops."""
