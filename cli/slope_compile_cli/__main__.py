"""`python -m slope_compile_cli`."""

from slope_compile_cli.main import main

main()
