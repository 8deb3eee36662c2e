"""`python -m mmscale` is the `mmscale` command (for `torchrun -m mmscale train ...`)."""

from mmscale.cli.main import main

if __name__ == "__main__":
    main()
