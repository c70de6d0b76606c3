"""``python -m ember COMMAND``: the command line is in ``ember.batch``."""

import sys

from ember.batch.cli import main

if __name__ == "__main__":
    sys.exit(main())
