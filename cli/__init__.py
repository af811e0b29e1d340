"""The command line, installed as `kruify.cli`: parse, call, print. One file per command; neither logic nor torch."""
