"""``python -m softtune``, for torchrun and accelerate, which start modules. Internal."""

from softtune_command import main

main()
