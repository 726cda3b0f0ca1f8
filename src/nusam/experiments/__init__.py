"""The command-line experiments. They need ``pip install "nusam[experiments]"``; the library does not need them."""
