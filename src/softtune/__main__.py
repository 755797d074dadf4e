"""``python -m softtune``, for torchrun and accelerate, which start modules."""

from softtune_command import main

main()
