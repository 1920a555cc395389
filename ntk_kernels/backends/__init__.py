"""One module per backend; each has `forward` and `backward` with the arguments of the ops in `library.py`."""
