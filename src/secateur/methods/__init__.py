"""One paper, one file: `ls` is the catalogue."""
