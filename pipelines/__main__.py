"""`python -m pipelines`: the command line where the script `saebase` is not on the path."""

from .cli import main

main()
