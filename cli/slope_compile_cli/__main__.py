"""`python -m slope_compile_cli`."""

from slope_compile_cli.entry import main

main()
