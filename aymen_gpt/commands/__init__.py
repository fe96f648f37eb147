"""One module a command. ``python -m aymen_gpt NAME`` reads its words (options.py), then imports and calls it."""

import sys
from itertools import pairwise

for option, module in pairwise(sys.orig_argv):  # else Python would import the command and end without a word
    if option == "-m" and module.startswith("aymen_gpt.commands.") and not module.endswith(".demo"):
        sys.stderr.write(f"error: type python -m aymen_gpt {module.rpartition('.')[2]}\n")
        sys.exit(2)
