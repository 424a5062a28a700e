"""`python -m secateur`, and so `torchrun -m secateur`: the command line."""

from secateur.cli import main

main()
