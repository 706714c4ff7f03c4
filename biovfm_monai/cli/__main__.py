"""`python -m biovfm_monai.cli`."""

from biovfm_monai.cli import main

main()
