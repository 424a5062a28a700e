"""One file per paper: its central claim, measured again at the size we can afford. See README.md."""
