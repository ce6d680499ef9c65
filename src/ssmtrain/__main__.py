"""`python -m ssmtrain` is the command line."""

import sys

from ssmtrain.cli import main

sys.exit(main())
