"""`python -m tokjax`: the command `tokjax`."""

from tokjax.cli import main

main()
