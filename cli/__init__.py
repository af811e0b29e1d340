"""The command line, installed as `kruify.cli`: parse, call, print. One file a command; no logic, no torch at import."""
