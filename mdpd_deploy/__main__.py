"""`python -m mdpd_deploy`: the same as the `mdpd` command."""

import sys

from mdpd_deploy.cli import main

if __name__ == "__main__":
    sys.exit(main())
