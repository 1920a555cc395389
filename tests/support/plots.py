"""Plots that a command has written."""


def is_png(path):
    return path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
