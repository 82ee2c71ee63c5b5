"""What is timed, what it is compared with, and how.

Needs JAX, NumPy and tokjax; `experiments` needs more, and builds on this.
"""
