"""How results are shown: pages, charts and the terminal."""
