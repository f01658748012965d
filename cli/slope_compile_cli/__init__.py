"""The command line of slope-compile: parse, call the library, print."""
